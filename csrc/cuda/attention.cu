// Attention forward with side outputs, in float16 and bfloat16: kernel -> launch -> op.
// Four warps share the K and V of one head, which arrive in chunks of 64 rows. Up to N = 320 all chunks are in flight
// at once, stay in shared memory, and the warps go over the queries in rounds; longer sequences stream through a ring.
#include "attention.cuh"

namespace p3b::cuda {
namespace {

constexpr int kWarps = 4;           // 32 queries each at 168 registers: three blocks, 12 warps on an SM
constexpr int kResidentChunks = 5;  // 5 x 64 keys x (K, V) x 64 channels = 80 KB: two blocks on an SM of an H200
constexpr float kMostWeight = 256;  // of a running maximum that lags; sums and products are float32, the ratio is exact

template <int kD>
constexpr int row_tiles() {
  return kD <= 64 ? 2 : 1;
}  // tiles of 16 queries per warp: what the registers hold

template <int kTiles>
struct RowState {
  float m[kTiles][2], l[kTiles][2], e[kTiles][2];  // maximum used, sum of weights, sum of weight * (logit - m)
};

// The maximum in use becomes the true one, and the sums follow.
template <int kD, int kTiles, int kGroups, bool kEntropy>
__device__ __forceinline__ void raise_maximum(float (&o)[kTiles][kD / 8][4], RowState<kTiles>& row, const float (&s)[kTiles][kGroups][4],
                                              float scale) {
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = fmaxf(s[t][0][2 * r], s[t][0][2 * r + 1]);
      if (kGroups == 2) top = fmaxf(top, fmaxf(s[t][kGroups - 1][2 * r], s[t][kGroups - 1][2 * r + 1]));
      const float m = fmaxf(row.m[t][r], group_max(top, 4) * scale), shift = row.m[t][r] - m, factor = fast_exp2(shift);
      if (kEntropy) row.e[t][r] = (row.e[t][r] + row.l[t][r] * shift) * factor;
      row.l[t][r] *= factor;
      row.m[t][r] = m;
#pragma unroll
      for (int d = 0; d < kD / 8; d++) o[t][d][2 * r] *= factor, o[t][d][2 * r + 1] *= factor;
    }
}

// Weights of the logits in their place, and their sums over this lane's keys. Says whether a sum is large.
template <int kTiles, int kGroups, bool kEntropy>
__device__ __forceinline__ bool weights(float (&s)[kTiles][kGroups][4], RowState<kTiles>& sums, const RowState<kTiles>& row, float scale) {
  bool large = false;
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int i = 0; i < kGroups * 2; i++) {
        float& y = s[t][i / 2][2 * r + i % 2];
        const float x = fmaf(y, scale, -row.m[t][r]);
        y = fast_exp2(x);
        sums.l[t][r] = i ? sums.l[t][r] + y : y;
        if (kEntropy) sums.e[t][r] = i ? fmaf(y, x, sums.e[t][r]) : y * x;
      }
      large |= sums.l[t][r] > kMostWeight;
    }
  return large;
}

// 8 kGroups keys: logits, weights, running sums, weighted values. Logits are raw, before the scale, until they become
// exponents; what a key adds, over the scale, is the initial value of its products. The maximum in use is the first keys'
// and is raised only where a later weight would be large, which is rare: then the logits are computed again.
template <class T, int kD, int kTiles, int kGroups, bool kEntropy, class Row0>
__device__ __forceinline__ void forward_step(float (&o)[kTiles][kD / 8][4], RowState<kTiles>& row, const uint32_t (&q)[kTiles][kD / 16][4],
                                             SharedAddress keys, SharedAddress values, SharedAddress bias, float scale, bool start, Row0 row0_end,
                                             int left) {
  float s[kTiles][kGroups][4];
  RowState<kTiles> sums;
  auto logits = [&] {
    Initial4 added[kGroups];
    load_columns(added, bias, 0);
    rows_product<T, kD>(s, q, keys, [&](int, int i) { return added[i]; });
  };
  logits();
  // Row 0's logits wait in its output until the sum is known; each lane reads back what it wrote.
  if (left > 0) {
    float* row0 = row0_end() - left;
#pragma unroll
    for (int i = 0; i < kGroups * 2; i++)
      if (i / 2 * 8 + i % 2 < left) row0[i / 2 * 8 + i % 2] = s[0][i / 2][i % 2];
  }
  if (start) raise_maximum<kD, kTiles, kGroups, kEntropy>(o, row, s, scale);
  const bool large = weights<kTiles, kGroups, kEntropy>(s, sums, row, scale);
  if (__any_sync(kAllLanes, large)) {
    logits();
    raise_maximum<kD, kTiles, kGroups, kEntropy>(o, row, s, scale);
    weights<kTiles, kGroups, kEntropy>(s, sums, row, scale);
  }
  uint32_t p[kTiles][4];
  pack_fragments<T>(p, s);
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row.l[t][r] += sums.l[t][r];
      if (kEntropy) row.e[t][r] += sums.e[t][r];
    }
  channels_product<T, kD>(o, p, values);
}

// The keys of a chunk, 16 at a time, the last 8 alone where they suffice; `left` keys are left in the sequence. The
// logits of query 0 go to the row that ends at row0_end().
template <class T, int kD, int kTiles, bool kEntropy, class Row0>
__device__ __forceinline__ void forward_chunk(float (&o)[kTiles][kD / 8][4], RowState<kTiles>& row, const uint32_t (&q)[kTiles][kD / 16][4],
                                              const T* keys, const T* values, const float* columns, float scale, bool start, bool has_row0,
                                              Row0 row0_end, int left) {
  const int lane = threadIdx.x % 32, count = min(left, kChunk), whole = (count + 7) / 16 * 16;
  const SharedAddress k = by_rows<kD>(keys, 0), v = by_channels<kD>(values, 0), bias = lane_columns(columns);
  constexpr int kRow = kD * sizeof(T);
  const int its_left = has_row0 && lane < 4 ? left - lane * 2 : 0;
#pragma unroll 1
  for (int j = 0; j < whole; j += 16)
    forward_step<T, kD, kTiles, 2, kEntropy>(o, row, q, k + j * kRow, v + j * kRow, bias + j * 8, scale, start && j == 0, row0_end, its_left - j);
  if (whole < count)
    forward_step<T, kD, kTiles, 1, kEntropy>(o, row, q, by_eight<kD>(keys, whole), v + whole * kRow, bias + whole * 8, scale, start && whole == 0,
                                             row0_end, its_left - whole);
}

// Sum of squares of the gated values, one thread per row of a chunk. A masked token has a value too, which is not in
// the tile: it comes from v, the chunk's rows in global memory.
template <class T, int kD>
__device__ __forceinline__ void value_squares(const T* values, const T* v, int64_t stride, int columns, const bool* mask, const float* gate, int rows,
                                              int N, float* out) {
  for (int row = threadIdx.x; row < rows && row < N; row += blockDim.x) {
    float sum = 0;
    const bool masked = mask && !mask[row];
#pragma unroll 1
    for (int piece = 0; piece * 8 < columns; piece++) {
      Pack16<T> x;
      if (masked)
        x = load16(v + row * stride + piece * 8);
      else
        x = load16(values + tile_offset<kD>(row, piece));
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float y = to_float(x.at[i]) * (gate ? gate[piece * 8 + i] : 1.f);
        sum = fmaf(y, y, sum);
      }
    }
    out[row] = sum;
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kWarps * 32, kD == 32    ? 4
                                               : kD == 128 ? 2
                                                           : 3) forward_kernel(ForwardArguments a) {
  P3B_SHARED(memory);
  constexpr int kTiles = row_tiles<kD>();
  const int lane = threadIdx.x % 32, chunks = static_cast<int>(ceil_div(a.N, kChunk));
  const unsigned block = blockIdx.x % a.row_blocks, head = blockIdx.x / a.row_blocks;
  T* all_keys = reinterpret_cast<T*>(memory);  // [ring_rows][kD], and as many values
  T* all_values = all_keys + a.ring_rows * kD;
  float* bias = reinterpret_cast<float*>(all_values + a.ring_rows * kD);  // [stages][kChunk] keys, two numbers for each
  float* gate = a.channel_gate ? bias + a.stages * kChunk * 2 : nullptr;
  // Computed at each use: held over the loops, pointers would cost registers.
  auto its = [&](const void* p, const Strides& s) { return static_cast<const T*>(p) + head / a.H * s.batch + head % a.H * s.head; };
  auto chunk_rows = [&](int c) { return min(kChunk, static_cast<int>(round_up(a.N - c * kChunk, 16))); };
  auto load = [&](int c) {
    if (c < chunks) {
      const int slot = c % a.stages * kChunk;
      const unsigned b = head / a.H;
      const bool* mask = mask_of(a, b);
      load_tile<kD>(all_keys + slot * kD, its(a.k, a.k_strides), a.k_strides.row, c * kChunk, chunk_rows(c), a.N, a.columns, mask);
      load_tile<kD>(all_values + slot * kD, its(a.v, a.v_strides), a.v_strides.row, c * kChunk, chunk_rows(c), a.N, a.columns, mask);
      for (int i = threadIdx.x; i < kChunk; i += blockDim.x) store_column(bias, slot + i, before_scale(a, key_bias(a, b, c * kChunk + i)));
    }
    cp_async_commit();  // an empty group too: then chunk c has landed when stages - 1 groups are pending
  };
  for (int c = 0; c < a.stages; c++) load(c);
  if (gate) {
    load_gate(a, head % a.H, gate, kD);
    __syncthreads();
  }

  // The last round has work for some warps only: not for the same ones in every block, as each belongs to a scheduler.
  const unsigned warps = blockDim.x / 32;
  int first = static_cast<int>(block * a.rounds * warps + (warp_number() + head) % warps) * kTiles * 16;  // this warp's first query
  for (int round = 0; round < a.rounds; round++, first += static_cast<int>(warps) * kTiles * 16) {
    uint32_t queries[kTiles][kD / 16][4];
    float o[kTiles][kD / 8][4] = {};
    RowState<kTiles> row;
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      load_fragments<kD>(queries[t], its(a.q, a.q_strides), a.q_strides.row, first + t * 16, a.N, a.columns);
      apply_sign<T>(a, queries[t]);
#pragma unroll
      for (int r = 0; r < 2; r++) row.m[t][r] = a.positive.unset, row.l[t][r] = row.e[t][r] = 0;
    }
#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
      const int slot = c % a.stages * kChunk;
      T *keys = all_keys + slot * kD, *values = all_values + slot * kD;
      if (round == 0) {  // more rounds than one only where all chunks are resident
        cp_async_wait(a.stages - 1);
        if (gate) gate_tile<kD>(keys, chunk_rows(c), gate, true);
        __syncthreads();
        if (a.value_squares && hidden(blockIdx.x) % a.row_blocks == 0) {
          const bool* mask = mask_of(a, head / a.H);
          value_squares<T, kD>(values, its(a.v, a.v_strides) + c * kChunk * a.v_strides.row, a.v_strides.row, a.columns,
                               mask ? mask + c * kChunk : nullptr, gate, kChunk, a.N - c * kChunk,
                               a.value_squares + static_cast<int64_t>(head) * a.N + c * kChunk);
        }
      }
      if (first < a.N) {
        auto row0_end = [&] { return a.cls_attention + static_cast<int64_t>(hidden(head) + 1) * a.N; };
        const bool has_row0 = a.cls_attention && first == 0;
        const int left = a.N - c * kChunk;
        if (a.entropy)
          forward_chunk<T, kD, kTiles, true>(o, row, queries, keys, values, bias + slot * 2, a.positive.scale, c == 0, has_row0, row0_end, left);
        else
          forward_chunk<T, kD, kTiles, false>(o, row, queries, keys, values, bias + slot * 2, a.positive.scale, c == 0, has_row0, row0_end, left);
      }
      if (round == 0) {
        if (c + a.stages < chunks) __syncthreads();
        load(c + a.stages);
      }
    }
    if (first >= a.N) return;  // no barrier follows: the rounds after the first have none

    const int first_row = hidden(first);  // addresses of results computed before the loop would cost registers in it
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float l = group_sum(row.l[t][r], 4), inverse = l == 0 ? 0.f : 1.f / l;
        const float e = a.entropy ? group_sum(row.e[t][r], 4) : 0.f;
#pragma unroll
        for (int d = 0; d < kD / 8; d++) o[t][d][2 * r] *= inverse, o[t][d][2 * r + 1] *= inverse;
        if (gate) {
#pragma unroll
          for (int d = 0; d < kD / 8; d++) o[t][d][2 * r] *= gate[d * 8 + lane % 4 * 2], o[t][d][2 * r + 1] *= gate[d * 8 + lane % 4 * 2 + 1];
        }
        const int n = first_row + t * 16 + lane / 4 + 8 * r;
        if (lane % 4 == 0 && n < a.N) {
          const int64_t row_at = static_cast<int64_t>(head) * a.N;
          const float log_sum = log2f(l);
          a.lse[row_at + n] = l == 0 ? -INFINITY : (row.m[t][r] + log_sum) * kLn2;
          if (a.entropy) {
            const float entropy = (log_sum - e * inverse) * kLn2;
            a.entropy[row_at + n] = l == 0 ? 0.f : entropy < 0 ? 0.f : entropy;  // keeps NaN
          }
        }
        if (a.cls_attention && first_row == 0 && t == 0 && r == 0 && lane < 4) {
          float* cls = a.cls_attention + static_cast<int64_t>(head) * a.N;
          for (int j0 = lane * 2; j0 < a.N; j0 += 8)
            for (int j = j0; j < j0 + 2 && j < a.N; j++) cls[j] = fast_exp2(fmaf(cls[j], a.positive.scale, -row.m[0][0])) * inverse;
        }
      }
      T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(head / a.H) * a.N * a.H + head % a.H) * a.columns;
      store_rows<kD>(o[t], out, static_cast<int64_t>(a.H) * a.columns, first_row + t * 16, a.N, a.columns);
    }
  }
}

// A row of logits against the known sum: attention to key 0, and the mean over queries for every key.
template <class T, int kD>
__global__ void __launch_bounds__(128) columns_kernel(ColumnArguments a) {
  P3B_SHARED(memory);
  const int lane = threadIdx.x % 32, block = blockIdx.x % a.row_blocks;
  const int64_t head = blockIdx.x / a.row_blocks, b = head / a.H;
  const int h = static_cast<int>(head % a.H), first = (block * 4 + warp_number()) * 16;
  T* tile = reinterpret_cast<T*>(memory);                     // Q[64][kD]
  float* lse = reinterpret_cast<float*>(tile + kChunk * kD);  // [kChunk]
  float* gate = a.channel_gate ? lse + kChunk : nullptr;
  const T* q = static_cast<const T*>(a.q) + b * a.q_strides.batch + h * a.q_strides.head;
  const T* k = static_cast<const T*>(a.k) + b * a.k_strides.batch + h * a.k_strides.head;
  if (gate) load_gate(a, h, gate, kD);
  __syncthreads();
  uint32_t keys[1][kD / 16][4];
  load_fragments<kD>(keys[0], k, a.k_strides.row, first, a.N, a.columns, mask_of(a, b));
  if (gate) gate_fragments<kD, T>(keys[0], gate, true);
  const float bias[2] = {key_bias(a, b, first + lane / 4), key_bias(a, b, first + lane / 4 + 8)};
  const float scale = a.scale * kLog2e;
  float sum[2] = {0, 0};
  for (int i0 = 0; i0 < a.N; i0 += kChunk) {
    load_tile<kD>(tile, q, a.q_strides.row, i0, kChunk, a.N, a.columns);
    cp_async_commit();
    for (int i = threadIdx.x; i < kChunk; i += blockDim.x) lse[i] = row_lse(a, a.lse, head, i0 + i);
    cp_async_wait(0);
    __syncthreads();
    for (int i = 0; i < kChunk; i += 16) {
      float s[1][2][4];  // without lse, which would cost the sum over queries some of its accuracy
      rows_product<T, kD>(s, keys, by_rows<kD>(tile, i), [](int, int) { return Initial4{}; });
#pragma unroll
      for (int x = 0; x < 8; x++) {
        const int column = i + x / 4 * 8 + lane % 4 * 2 + x % 2, r = x % 4 / 2;
        const float p = fast_exp2(fmaf(s[0][x / 4][x % 4], scale, bias[r]) - lse[column]);
        sum[r] += p;
        if (a.to_cls && first == 0 && r == 0 && lane < 4 && i0 + column < a.N) a.to_cls[head * a.N + i0 + column] = p;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float total = group_sum(sum[r], 4);
    const int n = first + lane / 4 + 8 * r;
    if (a.received && lane % 4 == 0 && n < a.N) a.received[head * a.N + n] = total / a.N;
  }
}

template <class T>
cudaError_t forward(ForwardArguments a, cudaStream_t stream) {
  a.positive = positive_scale(a.scale);
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    const size_t limit = shared_memory_limit();
    const int chunks = static_cast<int>(ceil_div(a.N, kChunk));
    auto place = [&](int stages, int64_t rows) {
      a.stages = stages;
      a.ring_rows = static_cast<int>(rows);
      return rows * 2 * kD * sizeof(T) + stages * kChunk * 2 * sizeof(float) + (a.channel_gate ? kD * sizeof(float) : 0);
    };
    size_t bytes = place(chunks, round_up(a.N, 16));
    const bool resident = chunks <= kResidentChunks && bytes <= limit;
    if (!resident) bytes = place(3, 3 * kChunk);
    if (bytes > limit) bytes = place(2, 2 * kChunk);

    const int64_t groups = ceil_div(a.N, 16 * row_tiles<kD>());
    const bool in_rounds = resident && a.B * a.H >= many_heads;
    a.rounds = in_rounds ? static_cast<int>(ceil_div(groups, kWarps)) : 1;
    a.row_blocks = in_rounds ? 1 : static_cast<int>(ceil_div(groups, kWarps));
    const int warps = static_cast<int>(ceil_div(groups, a.rounds * a.row_blocks));
    return launch(forward_kernel<T, kD>, a.B * a.H * a.row_blocks, warps * 32, bytes, stream, a);
  });
}

template <class T>
cudaError_t columns(ColumnArguments a, cudaStream_t stream) {
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    a.row_blocks = a.received ? static_cast<int>(ceil_div(a.N, 64)) : 1;
    const size_t bytes = kChunk * (kD * sizeof(T) + sizeof(float)) + (a.channel_gate ? kD * sizeof(float) : 0);
    return launch(columns_kernel<T, kD>, a.B * a.H * a.row_blocks, 128, bytes, stream, a);
  });
}

// out[b, n] = sqrt(sum over h of in[b, h, n]), in the order of the heads
__global__ void value_norm_kernel(const float* in, float* out, int64_t count, int H, int N) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float* from = in + i / N * H * N + i % N;
  float sum = 0;
  for (int h = 0; h < H; h++) sum += from[static_cast<int64_t>(h) * N];
  out[i] = sqrtf(sum);
}

}  // namespace

template <>
cudaError_t attention_forward<__half>(ForwardArguments a, cudaStream_t stream) {
  return forward<__half>(a, stream);
}
template <>
cudaError_t attention_forward<__nv_bfloat16>(ForwardArguments a, cudaStream_t stream) {
  return forward<__nv_bfloat16>(a, stream);
}
template <>
cudaError_t attention_columns<__half>(ColumnArguments a, cudaStream_t stream) {
  return columns<__half>(a, stream);
}
template <>
cudaError_t attention_columns<__nv_bfloat16>(ColumnArguments a, cudaStream_t stream) {
  return columns<__nv_bfloat16>(a, stream);
}

cudaError_t attention_value_norm(const float* value_squares, float* value_norm, int64_t B, int H, int N, cudaStream_t stream) {
  return launch(value_norm_kernel, ceil_div(B * N, 256), 256, 0, stream, value_squares, value_norm, B * N, H, N);
}

}  // namespace p3b::cuda

#ifndef P3B_CUDA_ON_CPU
#include <vector>

#include "../attention.h"
#include "ops.cuh"

namespace p3b::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Every row (the last axis) of t on 16 bytes, with D rounded up to 8: t itself, or a copy.
Tensor aligned(const Tensor& t) {
  const int64_t last = t.dim() - 1, D = t.size(last), element = t.element_size();
  if (D % 8) return torch::stable::contiguous(torch::stable::pad(t, {0, 8 - D % 8}));
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && (t.stride(last) == 1 || D == 1);
  for (int64_t axis = 0; axis < last; axis++) fits = fits && (t.size(axis) <= 1 || t.stride(axis) * element % 16 == 0);
  if (fits) return t;
  const Tensor rows = torch::stable::contiguous(t);
  return rows.const_data_ptr() == t.const_data_ptr() ? torch::stable::clone(t) : rows;
}

// The inputs as the kernels want them; keeps alive what had to be copied.
struct Inputs {
  std::vector<Tensor> heads;
  OptionalTensor key_mask, token_size, channel_gate;
  AttentionArguments a{};

  // q, k, v [B, H, N, D]
  Inputs(const char* op, const Attention& s, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
         const OptionalTensor& size, const OptionalTensor& gate)
      : Inputs(op, s, mask, size, gate) {
    heads = {aligned(q), aligned(k), aligned(v)};
    const Strides strides[] = {strides_of(heads[0], 1, 2), strides_of(heads[1], 1, 2), strides_of(heads[2], 1, 2)};
    point_to(heads[0].const_data_ptr(), heads[1].const_data_ptr(), heads[2].const_data_ptr(), strides[0], strides[1], strides[2]);
  }

  // qkv [B, N, 3, H, D], by its strides
  Inputs(const char* op, const Attention& s, const Tensor& qkv, const OptionalTensor& mask, const OptionalTensor& size, const OptionalTensor& gate)
      : Inputs(op, s, mask, size, gate) {
    heads = {aligned(qkv)};
    const char* q = static_cast<const char*>(heads[0].const_data_ptr());
    const int64_t next = heads[0].stride(2) * heads[0].element_size();
    const Strides strides = strides_of(heads[0], 3, 1);
    point_to(q, q + next, q + 2 * next, strides, strides, strides);
  }

 private:
  Inputs(const char* op, const Attention& s, const OptionalTensor& mask, const OptionalTensor& size, const OptionalTensor& gate)
      : key_mask(contiguous(mask)), token_size(contiguous(size)), channel_gate(contiguous(gate)) {
    P3B_CHECK(s.D <= 128, op, ": q must have at most 128 channels per head on a GPU, got ", s.D);
    a.B = s.B;
    a.H = to_int(op, "heads", s.H);
    a.N = to_int(op, "tokens", s.N);
    a.D = static_cast<int>(s.D);
    a.columns = static_cast<int>(round_up(s.D, 8));
    a.scale = static_cast<float>(s.scale);
    a.key_mask = pointer<bool>(key_mask);
    a.token_size = pointer<float>(token_size);
    a.channel_gate = pointer<float>(channel_gate);
    a.gate_head = s.gate_per_head ? s.D : 0;
  }

  static Strides strides_of(const Tensor& t, int64_t head, int64_t token) { return {t.stride(0), t.stride(head), t.stride(token)}; }

  void point_to(const void* q, const void* k, const void* v, const Strides& q_strides, const Strides& k_strides, const Strides& v_strides) {
    a.q = q, a.k = k, a.v = v;
    a.q_strides = q_strides, a.k_strides = k_strides, a.v_strides = v_strides;
  }
};

Tensor first_channels(const Tensor& t, int64_t D) {
  if (t.size(t.dim() - 1) == D) return t;
  Tensor narrowed = t;
  narrowed = torch::stable::narrow(narrowed, t.dim() - 1, 0, D);
  return torch::stable::contiguous(narrowed);
}

// out, lse, cls_attention, entropy, value_norm
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs forward_op(const char* op, const Attention& s, const Tensor& like, const Inputs& in, const OnDevice& device, int64_t aux) {
  const auto rows = [&](bool wanted) { return wanted ? empty(like, {s.B, s.H, s.N}, ScalarType::Float) : empty(like, {0}, ScalarType::Float); };
  Tensor out = empty(like, {s.B, s.N, s.H, in.a.columns}, like.scalar_type());
  Tensor lse = rows(true), cls_attention = rows(aux & kClsAttention), entropy = rows(aux & kEntropy);
  Tensor squares = rows(aux & kValueNorm);
  Tensor value_norm = aux & kValueNorm ? empty(like, {s.B, s.N}, ScalarType::Float) : empty(like, {0}, ScalarType::Float);
  ForwardArguments a{};
  static_cast<AttentionArguments&>(a) = in.a;
  a.out = out.mutable_data_ptr();
  a.lse = pointer<float>(lse);
  a.cls_attention = aux & kClsAttention ? pointer<float>(cls_attention) : nullptr;
  a.entropy = aux & kEntropy ? pointer<float>(entropy) : nullptr;
  a.value_squares = aux & kValueNorm ? pointer<float>(squares) : nullptr;
  with_dtype(op, like, [&](auto zero) { check_launch(op, attention_forward<decltype(zero)>(a, device.stream)); });
  if (aux & kValueNorm) check_launch(op, attention_value_norm(a.value_squares, pointer<float>(value_norm), s.B, a.H, a.N, device.stream));
  return {first_channels(out, s.D), lse, cls_attention, entropy, value_norm};
}

Outputs masked_attention(Tensor q, Tensor k, Tensor v, OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate, double scale,
                         int64_t aux) {
  const char* op = "masked_attention";
  const Attention s = check_attention(op, q, k, &v, key_mask, token_size, channel_gate, scale);
  const OnDevice device(q);
  return forward_op(op, s, q, Inputs(op, s, q, k, v, key_mask, token_size, channel_gate), device, aux);
}

// Errors name masked_attention, the op that users know.
Outputs masked_attention_packed(Tensor qkv, OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate, double scale,
                                int64_t aux) {
  const char* op = "masked_attention";
  const Attention s = check_packed(op, qkv, key_mask, token_size, channel_gate, scale);
  const OnDevice device(qkv);
  return forward_op(op, s, qkv, Inputs(op, s, qkv, key_mask, token_size, channel_gate), device, aux);
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                             OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate,
                                                             double scale, int64_t which) {
  const char* op = "masked_attention_backward";
  const Attention s = check_attention(op, q, k, &v, key_mask, token_size, channel_gate, scale);
  check_attention_grad(op, s, q, grad_out, out, lse);
  const OnDevice device(q);
  const Inputs in(op, s, q, k, v, key_mask, token_size, channel_gate);
  const Tensor grad_rows = torch::stable::contiguous(aligned(grad_out)), out_rows = torch::stable::contiguous(aligned(out));
  const Tensor sums = torch::stable::contiguous(lse);
  Tensor grad_qkv = empty(q, {s.B, s.N, 3, s.H, in.a.columns}, q.scalar_type());
  const bool for_size = token_size && which & kTokenSize, for_gate = channel_gate && which & kChannelGate;
  Tensor grad_size = for_size ? empty(q, {s.B, s.N}, ScalarType::Float) : empty(q, {0}, ScalarType::Float);
  Tensor grad_gate = !for_gate         ? empty(q, {0}, ScalarType::Float)
                     : s.gate_per_head ? empty(q, {s.H, s.D}, ScalarType::Float)
                                       : empty(q, {s.D}, ScalarType::Float);
  Tensor delta = empty(q, {s.B, s.H, s.N}, ScalarType::Float);
  BackwardArguments a{};
  static_cast<AttentionArguments&>(a) = in.a;
  a.grad_out = grad_rows.const_data_ptr();
  a.out = out_rows.const_data_ptr();
  a.lse = pointer<float>(sums);
  a.delta = pointer<float>(delta);
  a.grad_qkv = grad_qkv.mutable_data_ptr();
  with_dtype(op, q, [&](auto zero) {
    using T = decltype(zero);
    a.key_blocks = attention_key_blocks<T>(a.N, a.columns);
    Tensor size_partial = empty(q, {for_size ? s.B * s.H * s.N : 0}, ScalarType::Float);
    Tensor gate_partial = empty(q, {for_gate ? s.B * s.H * a.key_blocks * a.columns : 0}, ScalarType::Float);
    a.size_partial = for_size ? pointer<float>(size_partial) : nullptr;
    a.gate_partial = for_gate ? pointer<float>(gate_partial) : nullptr;
    check_launch(op, attention_backward<T>(a, device.stream));
    if (for_size) check_launch(op, attention_size_grad(a, pointer<float>(grad_size), device.stream));
    if (for_gate) check_launch(op, attention_gate_grad(a, pointer<float>(grad_gate), device.stream));
  });
  return {first_channels(grad_qkv, s.D), grad_size, grad_gate};
}

std::tuple<Tensor, Tensor> attention_columns_op(Tensor q, Tensor k, Tensor lse, OptionalTensor key_mask, OptionalTensor token_size,
                                                OptionalTensor channel_gate, double scale, int64_t which) {
  const char* op = "attention_columns";
  const Attention s = check_attention(op, q, k, nullptr, key_mask, token_size, channel_gate, scale);
  check_dtype(op, "lse", lse, ScalarType::Float);
  check_same_device(op, "lse", lse, q);
  P3B_CHECK(lse.dim() == 3 && lse.size(0) == s.B && lse.size(1) == s.H && lse.size(2) == s.N, op, ": lse must be [B, H, N], got shape ", shape(lse));
  const OnDevice device(q);
  const Inputs in(op, s, q, k, k, key_mask, token_size, channel_gate);
  const Tensor sums = torch::stable::contiguous(lse);
  const auto rows = [&](bool wanted) { return wanted ? empty(q, {s.B, s.H, s.N}, ScalarType::Float) : empty(q, {0}, ScalarType::Float); };
  Tensor to_cls = rows(which & kToCls), received = rows(which & kReceived);
  ColumnArguments a{};
  static_cast<AttentionArguments&>(a) = in.a;
  a.lse = pointer<float>(sums);
  a.to_cls = which & kToCls ? pointer<float>(to_cls) : nullptr;
  a.received = which & kReceived ? pointer<float>(received) : nullptr;
  if (a.to_cls || a.received) with_dtype(op, q, [&](auto zero) { check_launch(op, attention_columns<decltype(zero)>(a, device.stream)); });
  return {to_cls, received};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CUDA, m) {
  m.impl("masked_attention", TORCH_BOX(&masked_attention));
  m.impl("masked_attention_packed", TORCH_BOX(&masked_attention_packed));
  m.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
  m.impl("attention_columns", TORCH_BOX(&attention_columns_op));
}

}  // namespace p3b::cuda
#endif
