// Bipartite matching, merging by slot and its inverse: kernel -> launch -> op.
#include "rows.cuh"

namespace p3b::cuda {

template <class T>
struct MatchArguments {
  RowsIn<T> metric;    // [B, N, D]
  const bool* source;  // [B, N], or null: even positions
  int* slot;           // [B, N]
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

struct MatchMemory {
  float *norm, *best, *sources_tile, *destinations_tile;
  int *source, *destination, *partner;
  uint32_t* merged;
  __device__ MatchMemory(unsigned char* memory, int N) {
    sources_tile = reinterpret_cast<float*>(memory);
    destinations_tile = sources_tile + kDepth * kTileStride;
    norm = destinations_tile + kDepth * kTileStride;
    best = norm + N;
    source = reinterpret_cast<int*>(best + N);
    destination = source + N;
    partner = destination + N;
    merged = reinterpret_cast<uint32_t*>(partner + N);
  }
  static size_t bytes(int N) { return 2 * kDepth * kTileStride * 4 + N * 20 + ceil_div(N, 32) * 4; }
};

// Normalised channels [d0, d0 + 32) of 64 tokens of `list`, channel-major; zeros beyond its end.
template <class T>
__device__ __forceinline__ void load_match_tile(float* tile, const T* metric, int64_t stride, const int* list, const float* norm, int first,
                                                int count, int d0, int D) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += blockDim.x) {
    const int token = i / kDepth, d = i % kDepth;
    float x = 0;
    if (first + token < count && d0 + d < D) {
      const int n = list[first + token];
      x = to_float(metric[n * stride + d0 + d]) / norm[n];
    }
    tile[d * kTileStride + token] = x;
  }
}

// One block per image. Similarities live in registers only; float32 throughout, whatever the dtype of the metric, so
// that the pairs are those of the float32 formula.
template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_kernel(MatchArguments<T> a) {
  P3B_SHARED(memory);
  const MatchMemory s(memory, a.N);
  const int64_t b = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
  const T* metric = a.metric.data + b * a.metric.batch;

  for (int n = warp; n < a.N; n += warps) {
    float sum = 0;
    for (int d = lane; d < a.D; d += 32) {
      const float x = to_float(metric[n * a.metric.row + d]);
      sum = fmaf(x, x, sum);
    }
    sum = group_sum(sum, 32);
    if (lane == 0) s.norm[n] = fmaxf(sqrtf(sum), 1e-12f);
  }
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
        load_match_tile(s.sources_tile, metric, a.metric.row, s.source, s.norm, s0, num_sources, d0, a.D);
        load_match_tile(s.destinations_tile, metric, a.metric.row, s.destination, s.norm, t0, num_destinations, d0, a.D);
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
  return launch(match_kernel<T>, a.N ? a.B : 0, kMatchThreads, MatchMemory::bytes(a.N), stream, a);
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

Tensor match_op(Tensor metric_in, int64_t r, int64_t num_prefix, std::optional<Tensor> source_in) {
  const char* op = "match_tokens";
  const Match s = check_match(op, metric_in, r, num_prefix, source_in);
  const Tensor metric = with_contiguous_rows(metric_in);
  const std::optional<Tensor> source = contiguous(source_in);
  const OnDevice device(metric);
  Tensor slot = empty(metric, {s.B, s.N}, ScalarType::Int);
  with_dtype(op, metric, [&](auto zero) {
    using T = decltype(zero);
    MatchArguments<T> a{};
    a.metric = {pointer<T>(metric), metric.stride(0), metric.stride(1)};
    a.source = pointer<bool>(source);
    a.slot = pointer<int>(slot);
    a.B = s.B;
    a.N = to_int(op, "tokens", s.N);
    a.D = to_int(op, "channels", s.D);
    a.num_prefix = static_cast<int>(s.num_prefix);
    a.r = static_cast<int>(s.r);
    check_launch(op, match_tokens(a, device.stream));
  });
  return slot;
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
  m.impl("merge_tokens", TORCH_BOX(&merge_op));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_backward_op));
  m.impl("unmerge_tokens", TORCH_BOX(&unmerge_op));
  m.impl("unmerge_tokens_backward", TORCH_BOX(&unmerge_backward_op));
}

}  // namespace p3b::cuda
#endif
