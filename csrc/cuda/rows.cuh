// Moving and summing whole token rows, for the select and merge families. A row of C channels is cut into pieces of
// 16 bytes, one per lane; where C or an address does not allow that, into single channels.
#pragma once

#include "common.cuh"

namespace p3b::cuda {

constexpr int kRowWarps = 8;
constexpr int kRowsInFlight = 4;  // rows that a warp loads before it uses the first

template <class T>
struct RowsIn {
  const T* data;       // [B, rows, C], contiguous channels
  int64_t batch, row;  // strides in elements
};

template <class T>
bool fits16(const T* p, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class T, int kSize>
struct Piece {
  T at[kSize];
  __device__ __forceinline__ static Piece load(const T* p) {
    Piece piece;
    if constexpr (kSize * sizeof(T) == 16) {
      const Pack16<T> pack = load16(p);
#pragma unroll
      for (int i = 0; i < kSize; i++) piece.at[i] = pack.at[i];
    } else {
      piece.at[0] = *p;
    }
    return piece;
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kSize * sizeof(T) == 16) {
      Pack16<T> pack;
#pragma unroll
      for (int i = 0; i < kSize; i++) pack.at[i] = at[i];
      store16(p, pack);
    } else {
      *p = at[0];
    }
  }
};

// out[b, n] = in[b, index[b, n]], or fill where the index names no row.
template <class T, int kSize, class Index>
__global__ void __launch_bounds__(kRowWarps * 32)
    gather_kernel(RowsIn<T> in, const Index* index, T* out, int64_t B, int N, int M, int C, float fill) {
  const int lane = threadIdx.x % 32, pieces = C / kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32) * kRowsInFlight;
  const T* from[kRowsInFlight];
  int64_t b = first / N;
  int n = static_cast<int>(first % N);
#pragma unroll
  for (int r = 0; r < kRowsInFlight; r++) {
    const int64_t row = first + r < B * N ? static_cast<int64_t>(index[first + r]) : -1;
    from[r] = row >= 0 && row < M ? in.data + b * in.batch + row * in.row : nullptr;
    if (++n == N) n = 0, b++;
  }
  for (int p = lane; p < pieces; p += 32) {
    Piece<T, kSize> piece[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      if (from[r]) {
        piece[r] = Piece<T, kSize>::load(from[r] + p * kSize);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; i++) piece[r].at[i] = from_float<T>(fill);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++)
      if (first + r < B * N) piece[r].store(out + (first + r) * C + p * kSize);
  }
}

template <class T, class Index>
cudaError_t gather_rows(RowsIn<T> in, const Index* index, T* out, int64_t B, int N, int M, int C, float fill, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t blocks = C ? ceil_div(B * N, kRowWarps * kRowsInFlight) : 0;
  const bool wide = C % kWide == 0 && fits16(in.data, in.batch) && fits16(in.data, in.row) && fits16(out);
  return launch(wide ? gather_kernel<T, kWide, Index> : gather_kernel<T, 1, Index>, blocks, kRowWarps * 32, 0, stream, in, index, out, B, N, M, C,
                fill);
}

template <class T, class Index>
struct CombineArguments {
  RowsIn<T> x;                 // [B, N, C]
  const Index* slot;           // [B, N]: the row of out that takes this token, none where outside [0, M)
  const float *size, *weight;  // [B, N] or null; weight, else size, else 1 weighs the rows
  T* out;                      // [B, M, C]
  float* size_out;             // [B, M] or null: sum of sizes
  int64_t B;
  int N, M, C, tiles;
  bool normalize;
};

// out[b, m] = sum over the tokens n of slot m, in rising order, of weight_n x_n, over the sum of weights where
// `normalize`. Every output row is written by one warp, which looks for its tokens itself: no atomics, one order.
// kStaged: slots, weights and sizes of the image are in shared memory; else each read goes to global memory.
template <class T, int kSize, class Index, bool kStaged>
__global__ void __launch_bounds__(kRowWarps * 32, 2) combine_kernel(CombineArguments<T, Index> a) {
  P3B_SHARED(memory);
  int* slots = reinterpret_cast<int*>(memory);
  float* weights_of = reinterpret_cast<float*>(slots + (kStaged ? a.N : 0));
  float* sizes_of = weights_of + (kStaged ? a.N : 0);
  const int lane = threadIdx.x % 32, pieces = a.C / kSize;
  const int64_t b = blockIdx.x / a.tiles;
  const auto read_slot = [&](int n) {
    const Index m = a.slot[b * a.N + n];
    return m >= 0 && m < a.M ? static_cast<int>(m) : -1;
  };
  const auto read_size = [&](int n) { return a.size ? a.size[b * a.N + n] : 1.f; };
  const auto read_weight = [&](int n) { return a.weight ? a.weight[b * a.N + n] : read_size(n); };
  if (kStaged) {
    for (int n = threadIdx.x; n < a.N; n += blockDim.x) {
      slots[n] = read_slot(n);
      sizes_of[n] = read_size(n);
      weights_of[n] = read_weight(n);
    }
    __syncthreads();
  }
  const auto slot = [&](int n) { return kStaged ? slots[n] : read_slot(n); };
  const auto size = [&](int n) { return kStaged ? sizes_of[n] : read_size(n); };
  const auto weight = [&](int n) { return kStaged ? weights_of[n] : read_weight(n); };

  const int first = (blockIdx.x % a.tiles * kRowWarps + threadIdx.x / 32) * kRowsInFlight;
  int head[kRowsInFlight], count[kRowsInFlight];
  float weights[kRowsInFlight], sizes[kRowsInFlight];
#pragma unroll
  for (int r = 0; r < kRowsInFlight; r++) {
    head[r] = -1;
    count[r] = 0;
    weights[r] = sizes[r] = 0;
  }
  for (int n0 = 0; n0 < a.N; n0 += 32) {
    const int n = n0 + lane, m = n < a.N ? slot(n) : -1;
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      const unsigned members = __ballot_sync(kAllLanes, m == first + r);
      if (!members) continue;
      if (head[r] < 0) head[r] = n0 + __ffs(members) - 1;
      count[r] += __popc(members);
      if (m == first + r) {
        weights[r] += weight(n);
        sizes[r] += size(n);
      }
    }
  }
  float factor[kRowsInFlight];
  bool copied[kRowsInFlight];  // the mean of one token is that token
#pragma unroll
  for (int r = 0; r < kRowsInFlight; r++) {
    const float total = group_sum(weights[r], 32), total_size = group_sum(sizes[r], 32);
    factor[r] = a.normalize && total != 0 ? total : 1.f;
    copied[r] = a.normalize && count[r] == 1 && total != 0 && total - total == 0;
    if (a.size_out && lane == 0 && first + r < a.M) a.size_out[b * a.M + first + r] = total_size;
  }

  const T* x = a.x.data + b * a.x.batch;
  for (int p0 = 0; p0 < pieces; p0 += 32) {
    const int column = (p0 + lane) * kSize;
    const bool active = p0 + lane < pieces;
    Piece<T, kSize> piece[kRowsInFlight] = {};
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++)
      if (active && head[r] >= 0) piece[r] = Piece<T, kSize>::load(x + head[r] * a.x.row + column);
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      if (copied[r]) continue;
      const float w = head[r] >= 0 ? weight(head[r]) : 0.f;
      float sum[kSize];
#pragma unroll
      for (int i = 0; i < kSize; i++) sum[i] = head[r] >= 0 ? w * to_float(piece[r].at[i]) : 0.f;
      if (count[r] > 1) {
        for (int n0 = head[r] / 32 * 32; n0 < a.N; n0 += 32) {
          const int n = n0 + lane;
          unsigned members = __ballot_sync(kAllLanes, n < a.N && n > head[r] && slot(n) == first + r);
          for (; members; members &= members - 1) {
            const int member = n0 + __ffs(members) - 1;
            if (active) {
              const auto more = Piece<T, kSize>::load(x + member * a.x.row + column);
#pragma unroll
              for (int i = 0; i < kSize; i++) sum[i] = fmaf(weight(member), to_float(more.at[i]), sum[i]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kSize; i++) piece[r].at[i] = from_float<T>(sum[i] / factor[r]);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++)
      if (active && first + r < a.M) piece[r].store(a.out + (b * a.M + first + r) * a.C + column);
  }
}

template <class T, class Index>
cudaError_t combine_rows(CombineArguments<T, Index> a, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  a.tiles = static_cast<int>(ceil_div(a.M, kRowWarps * kRowsInFlight));
  const bool wide = a.C % kWide == 0 && fits16(a.x.data, a.x.batch) && fits16(a.x.data, a.x.row) && fits16(a.out);
  const size_t bytes = static_cast<size_t>(a.N) * 12;
  if (bytes > static_cast<size_t>(shared_memory_limit()))
    return launch(combine_kernel<T, 1, Index, false>, a.B * a.tiles, kRowWarps * 32, 0, stream, a);
  return launch(wide ? combine_kernel<T, kWide, Index, true> : combine_kernel<T, 1, Index, true>, a.B * a.tiles, kRowWarps * 32, bytes, stream, a);
}

}  // namespace p3b::cuda
