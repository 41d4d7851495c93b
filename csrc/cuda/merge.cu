// Bipartite matching, merging by slot and its inverse: kernel -> launch -> op.
#include "rank.cuh"

namespace p3b::cuda {

template <class T>
struct MatchArguments {
  const T* metric;           // [B, H, N, D], averaged over heads
  int64_t batch, head, row;  // its strides in elements; contiguous channels
  int H;
  const bool* source;       // [B, N], or null: even positions
  const float* scores;      // [B, N - num_prefix], or null: match every image
  const float* thresholds;  // [B], or null: `threshold`. An image whose scores spread by as much drops its r lowest instead
  float threshold;
  bool relative;  // the spread is the variance over the squared mean
  float* rows;    // [B, N, D] scratch: the averaged rows of norm 1
  int* slot;      // [B, N]
  int64_t B;
  int N, D, num_prefix, r;
};

template <class T>
struct MergeBackwardArguments {
  const T *grad_y, *y;             // [B, M, C]
  const float* grad_size_out;      // [B, M] or null
  RowsIn<T> x;                     // [B, N, C]
  const int* slot;                 // [B, N]
  const float *size, *weight;      // [B, N] or null
  T* grad_x;                       // [B, N, C]
  float *grad_size, *grad_weight;  // [B, N], null where size / weight is
  int64_t B;
  int N, M, C, tiles;
  bool normalize;
};

namespace {

constexpr int kMatchThreads = 256;
constexpr int kTile = 64, kDepth = 32;  // 64 sources x 64 destinations, 32 channels at a time; 4 x 4 products a thread
constexpr int kTileStride = kTile + 4;  // 16-byte rows, and the transposing stores miss each other's banks

constexpr float kSpreadRounding = 1e-5f;  // short of the threshold by rounding counts, as in p3b_ext/plan.py

struct MatchMemory {
  float *best, *sources_tile, *destinations_tile, *sums;
  int *source, *destination, *partner;
  uint32_t *merged, *keys;
  __device__ MatchMemory(unsigned char* memory, int N) {
    sources_tile = reinterpret_cast<float*>(memory);
    destinations_tile = sources_tile + kDepth * kTileStride;
    sums = destinations_tile + kDepth * kTileStride;
    best = sums + kRowWarps;
    source = reinterpret_cast<int*>(best + N);
    destination = source + N;
    partner = destination + N;
    merged = reinterpret_cast<uint32_t*>(partner + N);
    keys = reinterpret_cast<uint32_t*>(best);  // an image is pruned or matched
  }
  static constexpr int kFixed = (2 * kDepth * kTileStride + kRowWarps) * 4;
  static size_t bytes(int N) { return kFixed + static_cast<size_t>(N) * 16 + ceil_div(N, 32) * 4; }
};

// The most tokens that the shared memory of a block holds, of the matching and of the merge's backward.
inline int64_t most_matched() { return (shared_memory_limit() - MatchMemory::kFixed - 4) * int64_t{8} / 129; }
inline int64_t most_in_backward() { return shared_memory_limit() / 8; }

// Sum over the block, in one order; every thread gets it. `sums` holds one number per warp.
__device__ __forceinline__ float block_sum(float x, float* sums) {
  x = group_sum(x, 32);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (unsigned w = 0; w < blockDim.x / 32; w++) x += sums[w];
  return x;
}

// Whether an image's scores spread enough to drop tokens by them. All threads of the block agree.
template <class T>
__device__ __forceinline__ bool prunes(const MatchArguments<T>& a, const float* scores, int64_t b, float* sums) {
  const int S = a.N - a.num_prefix;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < S; i += blockDim.x) sum += scores[i];
  const float mean = block_sum(sum, sums) / S;
  for (int i = threadIdx.x; i < S; i += blockDim.x) squares = fmaf(scores[i] - mean, scores[i] - mean, squares);
  float spread = block_sum(squares, sums) / max(S - 1, 1);
  if (a.relative) spread /= mean * mean;
  return spread * (1 + kSpreadRounding) >= (a.thresholds ? a.thresholds[b] : a.threshold);
}

// Slots of an image that drops its r lowest scores; the others come out by score.
template <class T>
__device__ __forceinline__ void prune_image(const MatchArguments<T>& a, const float* scores, uint32_t* keys, int* slot) {
  const int S = a.N - a.num_prefix;
  for (int i = threadIdx.x; i < S; i += blockDim.x) keys[i] = score_key(scores[i]);
  for (int n = threadIdx.x; n < a.num_prefix; n += blockDim.x) slot[n] = n;
  __syncthreads();
  for (int first = threadIdx.x / 32 * kRowsInFlight; first < S; first += blockDim.x / 32 * kRowsInFlight) {
    int row[kRowsInFlight];
    rows_by_score(row, keys, S, S - a.r, first);
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++)
      if (static_cast<int>(threadIdx.x % 32) == r && first + r < S) slot[a.num_prefix + first + r] = row[r] < 0 ? -1 : a.num_prefix + row[r];
  }
}

// The rows of one image averaged over heads, rounded as such a mean is, over their 2-norm. A warp takes two rows; where
// they are short, groups of lanes take several heads at a time, 16 bytes a lane. Eight loads of a lane are in flight.
template <class T, int kSize>
__device__ __forceinline__ void normalise_rows(const MatchArguments<T>& a, const T* metric, float* rows) {
  constexpr int kRows = 2, kHeads = 4;
  const int lane = threadIdx.x % 32, pieces = a.D / kSize;
  int width = 1;
  while (width < 32 && width < pieces) width *= 2;
  const int group = lane / width, groups = 32 / width;
  for (int n0 = threadIdx.x / 32 * kRows; n0 < a.N; n0 += blockDim.x / 32 * kRows) {
    float square[kRows] = {};
    for (int p0 = 0; p0 < pieces; p0 += width) {
      const int column = (p0 + lane % width) * kSize;
      const bool inside = p0 + lane % width < pieces;
      float sum[kRows][kSize] = {};
      for (int h0 = group; h0 < a.H; h0 += groups * kHeads) {
        Piece<T, kSize> piece[kRows][kHeads] = {};
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
          for (int u = 0; u < kHeads; u++) {
            const int h = h0 + u * groups;
            if (inside && n0 + r < a.N && h < a.H) piece[r][u] = Piece<T, kSize>::load(metric + (n0 + r) * a.row + h * a.head + column);
          }
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
          for (int u = 0; u < kHeads; u++)
#pragma unroll
            for (int i = 0; i < kSize; i++) sum[r][i] += to_float(piece[r][u].at[i]);
      }
#pragma unroll
      for (int r = 0; r < kRows; r++)
#pragma unroll
        for (int i = 0; i < kSize; i++) {
          for (int x = width; x < 32; x *= 2) sum[r][i] += __shfl_xor_sync(kAllLanes, sum[r][i], x);
          const float mean = to_float(from_float<T>(sum[r][i] / a.H));
          square[r] = fmaf(mean, mean, square[r]);
          if (inside && group == 0 && n0 + r < a.N) rows[static_cast<int64_t>(n0 + r) * a.D + column + i] = mean;
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float norm = fmaxf(sqrtf(group_sum(square[r], width)), 1e-12f);
      if (group != 0 || n0 + r >= a.N) continue;
      float* to = rows + static_cast<int64_t>(n0 + r) * a.D;
      for (int p = lane % width; p < pieces; p += width)  // each lane what it wrote itself
#pragma unroll
        for (int i = 0; i < kSize; i++) to[p * kSize + i] /= norm;
    }
  }
}

// Channels [d0, d0 + 32) of 64 tokens of `list`, channel-major; zeros beyond its end.
__device__ __forceinline__ void load_match_tile(float* tile, const float* rows, const int* list, int first, int count, int d0, int D) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += blockDim.x) {
    const int token = i / kDepth, d = i % kDepth;
    const bool inside = first + token < count && d0 + d < D;
    tile[d * kTileStride + token] = inside ? rows[static_cast<int64_t>(list[first + token]) * D + d0 + d] : 0.f;
  }
}

// One block per image. Similarities live in registers only; float32 throughout, whatever the dtype of the metric, so
// that the pairs are those of the float32 formula.
template <class T, int kSize>
__global__ void __launch_bounds__(kMatchThreads, 2) match_kernel(MatchArguments<T> a) {
  P3B_SHARED(memory);
  const MatchMemory s(memory, a.N);
  const int64_t b = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const T* metric = a.metric + b * a.batch;
  float* rows = a.rows + b * a.N * a.D;
  if (a.scores) {
    const float* scores = a.scores + b * (a.N - a.num_prefix);
    if (prunes(a, scores, b, s.sums)) return prune_image(a, scores, s.keys, a.slot + b * a.N);
  }
  normalise_rows<T, kSize>(a, metric, rows);
  int num_sources = 0, num_destinations = 0;  // every warp counts, the first one writes the lists
  for (int n0 = a.num_prefix; n0 < a.N; n0 += 32) {
    const int n = n0 + lane;
    const bool is_source = n < a.N && (a.source ? a.source[b * a.N + n] : n % 2 == 0);
    const unsigned sources = __ballot_sync(kAllLanes, is_source);
    const unsigned others = __ballot_sync(kAllLanes, n < a.N && !is_source);
    const unsigned before = (1u << lane) - 1;
    if (warp == 0 && n < a.N) {
      if (is_source)
        s.source[num_sources + __popc(sources & before)] = n;
      else
        s.destination[num_destinations + __popc(others & before)] = n;
    }
    num_sources += __popc(sources);
    num_destinations += __popc(others);
  }
  __syncthreads();

  const int ty = thread / 16, tx = thread % 16;
  for (int s0 = 0; s0 < num_sources; s0 += kTile) {
    float best[4];
    int partner[4];
#pragma unroll
    for (int i = 0; i < 4; i++) best[i] = -INFINITY, partner[i] = 0;
    for (int t0 = 0; t0 < num_destinations; t0 += kTile) {
      float dot[4][4] = {};
      for (int d0 = 0; d0 < a.D; d0 += kDepth) {
        load_match_tile(s.sources_tile, rows, s.source, s0, num_sources, d0, a.D);
        load_match_tile(s.destinations_tile, rows, s.destination, t0, num_destinations, d0, a.D);
        __syncthreads();
#pragma unroll 8
        for (int d = 0; d < kDepth; d++) {
          const Pack16<float> x = load16(s.sources_tile + d * kTileStride + ty * 4);
          const Pack16<float> y = load16(s.destinations_tile + d * kTileStride + tx * 4);
#pragma unroll
          for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) dot[i][j] = fmaf(x.at[i], y.at[j], dot[i][j]);
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int t = t0 + tx * 4 + j;
          if (t < num_destinations && dot[i][j] > best[i]) best[i] = dot[i][j], partner[i] = t;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      for (int x = 1; x < 16; x *= 2) {  // the 16 threads of a row; equal similarities go to the lower position
        const float other = __shfl_xor_sync(kAllLanes, best[i], x);
        const int its = __shfl_xor_sync(kAllLanes, partner[i], x);
        if (other > best[i] || (other == best[i] && its < partner[i])) best[i] = other, partner[i] = its;
      }
      const int at = s0 + ty * 4 + i;
      if (tx == 0 && at < num_sources) s.best[at] = best[i], s.partner[at] = partner[i];
    }
  }
  __syncthreads();

  for (int i0 = 0; i0 < num_sources; i0 += blockDim.x) {
    const int i = i0 + thread;
    bool merges = false;
    if (i < num_sources) {
      const float mine = s.best[i];
      int rank = 0;
      for (int j = 0; j < i; j++) rank += s.best[j] >= mine;
      for (int j = i + 1; j < num_sources; j++) rank += s.best[j] > mine;
      merges = rank < a.r;
    }
    const unsigned bits = __ballot_sync(kAllLanes, merges);
    if (lane == 0 && i < num_sources) s.merged[i / 32] = bits;
  }
  __syncthreads();

  int* slot = a.slot + b * a.N;
  const int first_destination = a.num_prefix + num_sources - a.r;
  for (int n = thread; n < a.num_prefix; n += blockDim.x) slot[n] = n;
  for (int t = thread; t < num_destinations; t += blockDim.x) slot[s.destination[t]] = first_destination + t;
  for (int i = thread; i < num_sources; i += blockDim.x) {
    int merged_before = __popc(s.merged[i / 32] & ((1u << i % 32) - 1));
    for (int w = 0; w < i / 32; w++) merged_before += __popc(s.merged[w]);
    const bool merges = s.merged[i / 32] >> i % 32 & 1;
    slot[s.source[i]] = merges ? first_destination + s.partner[i] : a.num_prefix + i - merged_before;
  }
}

// One warp per two tokens: grad_x = weight / total * grad_y[slot], grad_weight = grad_y[slot] . (x - y[slot]) / total.
template <class T, int kSize>
__global__ void __launch_bounds__(kRowWarps * 32) merge_backward_kernel(MergeBackwardArguments<T> a) {
  P3B_SHARED(memory);
  constexpr int kRows = 2;
  int* slot = reinterpret_cast<int*>(memory);
  float* weight = reinterpret_cast<float*>(slot + a.N);
  const int lane = threadIdx.x % 32, pieces = a.C / kSize;
  const int64_t b = blockIdx.x / a.tiles;
  const float* weights = a.weight ? a.weight : a.size;
  for (int n = threadIdx.x; n < a.N; n += blockDim.x) {
    slot[n] = a.slot[b * a.N + n];
    weight[n] = weights ? weights[b * a.N + n] : 1.f;
  }
  __syncthreads();

  const int first = (blockIdx.x % a.tiles * kRowWarps + threadIdx.x / 32) * kRows;
  int row[kRows];
  float total[kRows], dot[kRows], mean[kRows];  // mean: 1 where y is a mean that depends on the weights, else 0
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    row[r] = first + r < a.N ? slot[first + r] : -1;
    if (row[r] >= a.M) row[r] = -1;
    float sum = 0;
    if (a.normalize)
      for (int n = lane; n < a.N; n += 32) sum += slot[n] == row[r] ? weight[n] : 0.f;
    sum = group_sum(sum, 32);
    mean[r] = a.normalize && sum != 0;
    total[r] = a.normalize && sum != 0 ? sum : 1.f;
    dot[r] = 0;
  }
  for (int p = lane; p < pieces; p += 32) {
    Piece<T, kSize> grad[kRows] = {}, x[kRows] = {}, y[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (row[r] < 0) continue;
      const int64_t at = (b * a.M + row[r]) * a.C + p * kSize;
      grad[r] = Piece<T, kSize>::load(a.grad_y + at);
      if (weights) {
        x[r] = Piece<T, kSize>::load(a.x.data + b * a.x.batch + (first + r) * a.x.row + p * kSize);
        y[r] = Piece<T, kSize>::load(a.y + at);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (first + r >= a.N) continue;
      const float factor = row[r] < 0 ? 0.f : weight[first + r] / total[r];
      Piece<T, kSize> grad_x = {};
      if (row[r] >= 0) {
#pragma unroll
        for (int i = 0; i < kSize; i++) {
          const float g = to_float(grad[r].at[i]);
          grad_x.at[i] = from_float<T>(g * factor);
          if (weights) dot[r] = fmaf(g, to_float(x[r].at[i]) - mean[r] * to_float(y[r].at[i]), dot[r]);
        }
      }
      grad_x.store(a.grad_x + (b * a.N + first + r) * a.C + p * kSize);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const float product = group_sum(dot[r], 32) / total[r];
    if (lane != 0 || first + r >= a.N) continue;
    const int64_t at = b * a.N + first + r;
    const float from_size = row[r] >= 0 && a.grad_size_out ? a.grad_size_out[b * a.M + row[r]] : 0.f;
    if (a.grad_weight) a.grad_weight[at] = product;
    if (a.grad_size) a.grad_size[at] = a.weight ? from_size : product + from_size;
  }
}

}  // namespace

template <class T>
cudaError_t match_tokens(const MatchArguments<T>& a, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = a.D % kWide == 0 && fits16(a.metric, a.batch) && fits16(a.metric, a.head) && fits16(a.metric, a.row);
  return launch(wide ? match_kernel<T, kWide> : match_kernel<T, 1>, a.N ? a.B : 0, kMatchThreads, MatchMemory::bytes(a.N), stream, a);
}

template <class T>
cudaError_t merge_backward(MergeBackwardArguments<T> a, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  a.tiles = static_cast<int>(ceil_div(a.N, kRowWarps * 2));
  const bool wide =
      a.C % kWide == 0 && fits16(a.x.data, a.x.batch) && fits16(a.x.data, a.x.row) && fits16(a.grad_y) && fits16(a.y) && fits16(a.grad_x);
  return launch(wide ? merge_backward_kernel<T, kWide> : merge_backward_kernel<T, 1>, a.B * a.tiles, kRowWarps * 32, static_cast<size_t>(a.N) * 8,
                stream, a);
}

}  // namespace p3b::cuda

#ifndef P3B_CUDA_ON_CPU
#include "../merge.h"
#include "ops.cuh"

namespace p3b::cuda {
namespace {

// set(arguments) adds what one of the two ops has beyond the other.
template <class F>
Tensor match(const char* op, const Match& s, const Tensor& metric_in, F set) {
  const Tensor metric = with_contiguous_rows(metric_in);
  const OnDevice device(metric);
  check_tokens(op, "metric", s.N, most_matched());
  Tensor slot = empty(metric, {s.B, s.N}, ScalarType::Int), rows = empty(metric, {s.B, s.N, s.D}, ScalarType::Float);
  with_dtype(op, metric, [&](auto zero) {
    using T = decltype(zero);
    const bool heads = metric.dim() == 4;
    MatchArguments<T> a{};
    a.metric = pointer<T>(metric);
    a.batch = metric.stride(0);
    a.head = heads ? metric.stride(1) : 0;
    a.row = metric.stride(metric.dim() - 2);
    a.H = heads ? to_int(op, "heads", metric.size(1)) : 1;
    a.rows = pointer<float>(rows);
    a.slot = pointer<int>(slot);
    a.B = s.B;
    a.N = to_int(op, "tokens", s.N);
    a.D = to_int(op, "channels", s.D);
    a.num_prefix = static_cast<int>(s.num_prefix);
    a.r = static_cast<int>(s.r);
    set(a);
    check_launch(op, match_tokens(a, device.stream));
  });
  return slot;
}

Tensor match_op(Tensor metric, int64_t r, int64_t num_prefix, std::optional<Tensor> source_in) {
  const char* op = "match_tokens";
  const Match s = check_match(op, metric, r, num_prefix, source_in, true);
  const std::optional<Tensor> source = contiguous(source_in);
  return match(op, s, metric, [&](auto& a) { a.source = pointer<bool>(source); });
}

Tensor match_or_prune_op(Tensor metric, Tensor scores_in, double threshold, std::optional<Tensor> thresholds_in, int64_t r, int64_t num_prefix,
                         bool relative) {
  const char* op = "match_or_prune";
  const Match s = check_match(op, metric, r, num_prefix, std::nullopt, true);
  check_dim(op, "scores", scores_in, 2);
  check_dtype(op, "scores", scores_in, ScalarType::Float);
  check_size(op, "scores", scores_in, 0, s.B);
  check_size(op, "scores", scores_in, 1, s.N - num_prefix);
  check_same_device(op, "scores", scores_in, metric);
  if (thresholds_in) {
    check_dim(op, "thresholds", *thresholds_in, 1);
    check_dtype(op, "thresholds", *thresholds_in, ScalarType::Float);
    check_size(op, "thresholds", *thresholds_in, 0, s.B);
    check_same_device(op, "thresholds", *thresholds_in, metric);
  }
  const Tensor scores = torch::stable::contiguous(scores_in);
  const std::optional<Tensor> thresholds = contiguous(thresholds_in);
  return match(op, s, metric, [&](auto& a) {
    a.scores = pointer<float>(scores);
    a.thresholds = pointer<float>(thresholds);
    a.threshold = static_cast<float>(threshold);
    a.relative = relative;
  });
}

std::tuple<Tensor, Tensor> merge_op(Tensor x_in, Tensor slot_in, int64_t num_out, std::optional<Tensor> size_in, std::optional<Tensor> weight_in,
                                    bool normalize) {
  const char* op = "merge_tokens";
  const Slots s = check_slots(op, "x", x_in, slot_in, num_out);
  check_size(op, "slot", slot_in, 1, x_in.size(1));
  check_weights(op, "size", size_in, x_in, s);
  check_weights(op, "weight", weight_in, x_in, s);
  const Tensor x = with_contiguous_rows(x_in), slot = torch::stable::contiguous(slot_in);
  const std::optional<Tensor> size = contiguous(size_in), weight = contiguous(weight_in);
  const OnDevice device(x);
  Tensor y = empty(x, {s.B, s.M, s.C}, x.scalar_type()), size_out = empty(x, {s.B, s.M}, ScalarType::Float);
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    CombineArguments<T, int> a{};
    a.x = {pointer<T>(x), x.stride(0), x.stride(1)};
    a.slot = pointer<int>(slot);
    a.size = pointer<float>(size);
    a.weight = pointer<float>(weight);
    a.out = pointer<T>(y);
    a.size_out = pointer<float>(size_out);
    a.B = s.B;
    a.N = to_int(op, "tokens", s.N);
    a.M = to_int(op, "num_out", s.M);
    a.C = to_int(op, "channels", s.C);
    a.normalize = normalize;
    check_launch(op, combine_rows(a, device.stream));
  });
  return {y, size_out};
}

std::tuple<Tensor, Tensor, Tensor> merge_backward_op(Tensor grad_y_in, std::optional<Tensor> grad_size_out_in, Tensor x_in, Tensor slot_in,
                                                     Tensor y_in, std::optional<Tensor> size_in, std::optional<Tensor> weight_in, bool normalize) {
  const char* op = "merge_tokens_backward";
  check_dim(op, "grad_y", grad_y_in, 3);
  const Slots s = check_slots(op, "x", x_in, slot_in, grad_y_in.size(1));
  check_size(op, "slot", slot_in, 1, x_in.size(1));
  check_weights(op, "size", size_in, x_in, s);
  check_weights(op, "weight", weight_in, x_in, s);
  const Tensor* outputs[] = {&grad_y_in, &y_in};
  const char* names[] = {"grad_y", "y"};
  const int64_t shape_of_y[] = {s.B, s.M, s.C};
  for (int i = 0; i < 2; i++) {
    check_dim(op, names[i], *outputs[i], 3);
    for (int64_t axis = 0; axis < 3; axis++) check_size(op, names[i], *outputs[i], axis, shape_of_y[axis]);
    check_dtype(op, names[i], *outputs[i], x_in.scalar_type());
    check_same_device(op, names[i], *outputs[i], x_in);
  }
  if (grad_size_out_in) {
    check_dim(op, "grad_size_out", *grad_size_out_in, 2);
    check_size(op, "grad_size_out", *grad_size_out_in, 0, s.B);
    check_size(op, "grad_size_out", *grad_size_out_in, 1, s.M);
    check_dtype(op, "grad_size_out", *grad_size_out_in, ScalarType::Float);
    check_same_device(op, "grad_size_out", *grad_size_out_in, x_in);
  }
  const Tensor grad_y = torch::stable::contiguous(grad_y_in), y = torch::stable::contiguous(y_in);
  const Tensor x = with_contiguous_rows(x_in), slot = torch::stable::contiguous(slot_in);
  const std::optional<Tensor> size = contiguous(size_in), weight = contiguous(weight_in);
  const std::optional<Tensor> grad_size_out = contiguous(grad_size_out_in);
  const OnDevice device(x);
  check_tokens(op, "x", s.N, most_in_backward());
  Tensor grad_x = empty(x, {s.B, s.N, s.C}, x.scalar_type());
  Tensor grad_size = size ? empty(x, {s.B, s.N}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  Tensor grad_weight = weight ? empty(x, {s.B, s.N}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    MergeBackwardArguments<T> a{};
    a.grad_y = pointer<T>(grad_y);
    a.y = pointer<T>(y);
    a.grad_size_out = pointer<float>(grad_size_out);
    a.x = {pointer<T>(x), x.stride(0), x.stride(1)};
    a.slot = pointer<int>(slot);
    a.size = pointer<float>(size);
    a.weight = pointer<float>(weight);
    a.grad_x = pointer<T>(grad_x);
    a.grad_size = size ? pointer<float>(grad_size) : nullptr;
    a.grad_weight = weight ? pointer<float>(grad_weight) : nullptr;
    a.B = s.B;
    a.N = to_int(op, "tokens", s.N);
    a.M = to_int(op, "rows", s.M);
    a.C = to_int(op, "channels", s.C);
    a.normalize = normalize;
    check_launch(op, merge_backward(a, device.stream));
  });
  return {grad_x, grad_size, grad_weight};
}

Tensor unmerge_op(Tensor y_in, Tensor slot_in, double fill) {
  const char* op = "unmerge_tokens";
  const Slots s = check_slots(op, "y", y_in, slot_in, 0);
  const Tensor y = with_contiguous_rows(y_in), slot = torch::stable::contiguous(slot_in);
  const OnDevice device(y);
  Tensor x = empty(y, {s.B, s.N, s.C}, y.scalar_type());
  with_dtype(op, y, [&](auto zero) {
    using T = decltype(zero);
    const RowsIn<T> in{pointer<T>(y), y.stride(0), y.stride(1)};
    check_launch(op, gather_rows(in, pointer<int>(slot), pointer<T>(x), s.B, to_int(op, "tokens", s.N), to_int(op, "rows", y.size(1)),
                                 to_int(op, "channels", s.C), static_cast<float>(fill), device.stream));
  });
  return x;
}

Tensor unmerge_backward_op(Tensor grad_in, Tensor slot_in, int64_t num_out) {
  const char* op = "unmerge_tokens_backward";
  const Slots s = check_slots(op, "grad", grad_in, slot_in, num_out);
  check_size(op, "slot", slot_in, 1, grad_in.size(1));
  const Tensor grad = with_contiguous_rows(grad_in), slot = torch::stable::contiguous(slot_in);
  const OnDevice device(grad);
  Tensor grad_y = empty(grad, {s.B, s.M, s.C}, grad.scalar_type());
  with_dtype(op, grad, [&](auto zero) {
    using T = decltype(zero);
    CombineArguments<T, int> a{};
    a.x = {pointer<T>(grad), grad.stride(0), grad.stride(1)};
    a.slot = pointer<int>(slot);
    a.out = pointer<T>(grad_y);
    a.B = s.B;
    a.N = to_int(op, "tokens", s.N);
    a.M = to_int(op, "num_out", s.M);
    a.C = to_int(op, "channels", s.C);
    check_launch(op, combine_rows(a, device.stream));
  });
  return grad_y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CUDA, m) {
  m.impl("match_tokens", TORCH_BOX(&match_op));
  m.impl("match_or_prune", TORCH_BOX(&match_or_prune_op));
  m.impl("merge_tokens", TORCH_BOX(&merge_op));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_backward_op));
  m.impl("unmerge_tokens", TORCH_BOX(&unmerge_op));
  m.impl("unmerge_tokens_backward", TORCH_BOX(&unmerge_backward_op));
}

}  // namespace p3b::cuda
#endif
