// Attention forward with side outputs, in float16 and bfloat16: kernel -> launch -> op.
// Four warps share the K and V of one head, which arrive in chunks of 64 rows. Up to N = 320 all chunks are in flight
// at once, stay in shared memory, and the warps go over the queries in rounds; longer sequences stream through a ring.
#include "attention.cuh"

namespace p3b::cuda {
namespace {

constexpr int kWarps = 4;           // 32 queries each at 168 registers: three blocks, 12 warps on an SM
constexpr int kResidentChunks = 5;  // 5 x 64 keys x (K, V) x 64 channels = 80 KB: two blocks on an SM of an H200
constexpr float kRescale = 8;       // a running maximum may lag by 2^8; sums and products are float32, the ratio is exact

template <int kD>
constexpr int row_tiles() {
  return kD <= 64 ? 2 : 1;
}  // tiles of 16 queries per warp: what the registers hold

template <int kTiles>
struct RowState {
  float m[kTiles][2], l[kTiles][2], e[kTiles][2];  // maximum used, sum of weights, sum of weight * (logit - m)
};

// 16 keys: logits, weights, running sums, weighted values.
template <class T, int kD, int kTiles>
__device__ __forceinline__ void forward_step(float (&o)[kTiles][kD / 8][4], RowState<kTiles>& row, const uint32_t (&q)[kTiles][kD / 16][4],
                                             const T* keys, const T* values, const float* bias, int j0, float scale, bool entropy, float* row0,
                                             int n0, int N) {
  const int lane = threadIdx.x % 32;
  float s[kTiles][2][4] = {};
  const int key = j0 + lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int kk = 0; kk < kD / 16; kk++) {
    uint32_t f[4];
    ldmatrix_x4<false>(f, keys + tile_offset<kD>(key, kk * 2 + lane / 8 % 2));
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      mma_16816<T>(s[t][0], q[t][kk], {f[0], f[1]});
      mma_16816<T>(s[t][1], q[t][kk], {f[2], f[3]});
    }
  }
  bool grown = false;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float2 b = *reinterpret_cast<const float2*>(bias + j0 + i * 8 + lane % 4 * 2);
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float* x = &s[t][i][2 * r];
        x[0] = fmaf(x[0], scale, b.x);
        x[1] = fmaf(x[1], scale, b.y);
        grown |= fmaxf(x[0], x[1]) > row.m[t][r] + kRescale;
      }
  }
  if (__any_sync(kAllLanes, grown)) {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float m = fmaxf(fmaxf(s[t][0][2 * r], s[t][0][2 * r + 1]), fmaxf(s[t][1][2 * r], s[t][1][2 * r + 1]));
        m = fmaxf(row.m[t][r], group_max(m, 4));
        const float shift = row.m[t][r] - m, factor = fast_exp2(shift);
        row.e[t][r] = (row.e[t][r] + row.l[t][r] * shift) * factor;
        row.l[t][r] *= factor;
        row.m[t][r] = m;
#pragma unroll
        for (int d = 0; d < kD / 8; d++) o[t][d][2 * r] *= factor, o[t][d][2 * r + 1] *= factor;
      }
  }
  // Row 0's logits wait in its output until the sum is known; each lane reads back what it wrote.
  if (row0 && lane < 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = n0 + i / 2 * 8 + lane * 2 + i % 2;
      if (n < N) row0[n] = s[0][i / 2][i % 2];
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int r = i % 4 / 2;
      const float x = s[t][i / 4][i % 4] - row.m[t][r], p = fast_exp2(x);
      row.l[t][r] += p;
      if (entropy) row.e[t][r] = fmaf(p, x, row.e[t][r]);
      s[t][i / 4][i % 4] = p;
    }
  uint32_t p[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; t++) pack_fragment<T>(p[t], s[t]);
#pragma unroll
  for (int d = 0; d < kD / 16; d++) {
    uint32_t f[4];
    ldmatrix_x4<true>(f, values + tile_offset<kD>(j0 + lane % 16, d * 2 + lane / 16));
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      mma_16816<T>(o[t][2 * d], p[t], {f[0], f[1]});
      mma_16816<T>(o[t][2 * d + 1], p[t], {f[2], f[3]});
    }
  }
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
  const int lane = threadIdx.x % 32, warp = warp_number(), block = blockIdx.x % a.row_blocks;
  const int head = blockIdx.x / a.row_blocks, h = head % a.H, chunks = static_cast<int>(ceil_div(a.N, kChunk));
  const int64_t b = head / a.H;
  T* all_keys = reinterpret_cast<T*>(memory);  // [ring_rows][kD], and as many values
  T* all_values = all_keys + a.ring_rows * kD;
  float* bias = reinterpret_cast<float*>(all_values + a.ring_rows * kD);
  float* gate = a.channel_gate ? bias + a.stages * kChunk : nullptr;
  const T* q = static_cast<const T*>(a.q) + b * a.q_strides.batch + h * a.q_strides.head;
  const T* k = static_cast<const T*>(a.k) + b * a.k_strides.batch + h * a.k_strides.head;
  const T* v = static_cast<const T*>(a.v) + b * a.v_strides.batch + h * a.v_strides.head;
  const bool* mask = mask_of(a, b);
  const float scale = a.scale * kLog2e;

  auto chunk_rows = [&](int c) { return min(kChunk, static_cast<int>(round_up(a.N - c * kChunk, 16))); };
  auto load = [&](int c) {
    if (c < chunks) {
      const int slot = c % a.stages * kChunk;
      load_tile<kD>(all_keys + slot * kD, k, a.k_strides.row, c * kChunk, chunk_rows(c), a.N, a.columns, mask);
      load_tile<kD>(all_values + slot * kD, v, a.v_strides.row, c * kChunk, chunk_rows(c), a.N, a.columns, mask);
      for (int i = threadIdx.x; i < kChunk; i += blockDim.x) bias[slot + i] = key_bias(a, b, c * kChunk + i);
    }
    cp_async_commit();  // an empty group too: then chunk c has landed when stages - 1 groups are pending
  };
  for (int c = 0; c < a.stages; c++) load(c);
  if (gate) {
    load_gate(a, h, gate, kD);
    __syncthreads();
  }

  for (int round = 0; round < a.rounds; round++) {
    const int group = (block * a.rounds + round) * static_cast<int>(blockDim.x / 32) + warp;
    const int first = group * kTiles * 16;  // this warp's first query
    uint32_t queries[kTiles][kD / 16][4];
    float o[kTiles][kD / 8][4] = {};
    RowState<kTiles> row;
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      load_fragments<kD>(queries[t], q, a.q_strides.row, first + t * 16, a.N, a.columns);
#pragma unroll
      for (int r = 0; r < 2; r++) row.m[t][r] = kUnset, row.l[t][r] = row.e[t][r] = 0;
    }
    float* cls = a.cls_attention && first == 0 ? a.cls_attention + static_cast<int64_t>(head) * a.N : nullptr;

#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
      const int slot = c % a.stages * kChunk;
      T *keys = all_keys + slot * kD, *values = all_values + slot * kD;
      if (round == 0) {  // more rounds than one only where all chunks are resident
        cp_async_wait(a.stages - 1);
        if (gate) gate_tile<kD>(keys, chunk_rows(c), gate, true);
        __syncthreads();
        if (a.value_squares && block == 0)
          value_squares<T, kD>(values, v + c * kChunk * a.v_strides.row, a.v_strides.row, a.columns, mask ? mask + c * kChunk : nullptr, gate, kChunk,
                               a.N - c * kChunk, a.value_squares + static_cast<int64_t>(head) * a.N + c * kChunk);
      }
      if (first < a.N) {
#pragma unroll 1
        for (int j0 = 0; j0 < chunk_rows(c); j0 += 16)
          forward_step<T, kD, kTiles>(o, row, queries, keys, values, bias + slot, j0, scale, a.entropy, cls, c * kChunk + j0, a.N);
      }
      if (round == 0) {
        if (c + a.stages < chunks) __syncthreads();
        load(c + a.stages);
      }
    }
    if (first >= a.N) return;  // no barrier follows: the rounds after the first have none

#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float l = group_sum(row.l[t][r], 4), inverse = l == 0 ? 0.f : 1.f / l;
        const float e = a.entropy ? group_sum(row.e[t][r], 4) : 0.f;
#pragma unroll
        for (int d = 0; d < kD / 8; d++) {
          const int column = d * 8 + lane % 4 * 2;
          o[t][d][2 * r] *= inverse * (gate ? gate[column] : 1.f);
          o[t][d][2 * r + 1] *= inverse * (gate ? gate[column + 1] : 1.f);
        }
        const int n = first + t * 16 + lane / 4 + 8 * r;
        if (lane % 4 == 0 && n < a.N) {
          const int64_t row_at = static_cast<int64_t>(head) * a.N;
          const float log_sum = log2f(l);
          a.lse[row_at + n] = l == 0 ? -INFINITY : (row.m[t][r] + log_sum) * kLn2;
          if (a.entropy) {
            const float entropy = (log_sum - e * inverse) * kLn2;
            a.entropy[row_at + n] = l == 0 ? 0.f : entropy < 0 ? 0.f : entropy;  // keeps NaN
          }
        }
        if (cls && t == 0 && r == 0 && lane < 4)
          for (int j0 = lane * 2; j0 < a.N; j0 += 8)
            for (int j = j0; j < j0 + 2 && j < a.N; j++) cls[j] = fast_exp2(cls[j] - row.m[0][0]) * inverse;
      }
      T* out = static_cast<T*>(a.out) + (b * a.N * a.H + h) * a.columns;
      store_rows<kD>(o[t], out, static_cast<int64_t>(a.H) * a.columns, first + t * 16, a.N, a.columns);
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
  T* tile = reinterpret_cast<T*>(memory);  // Q[64][kD]
  float* lse = reinterpret_cast<float*>(tile + kChunk * kD);
  float* gate = a.channel_gate ? lse + kChunk : nullptr;
  const T* q = static_cast<const T*>(a.q) + b * a.q_strides.batch + h * a.q_strides.head;
  const T* k = static_cast<const T*>(a.k) + b * a.k_strides.batch + h * a.k_strides.head;
  if (gate) load_gate(a, h, gate, kD);
  __syncthreads();
  uint32_t keys[kD / 16][4];
  load_fragments<kD>(keys, k, a.k_strides.row, first, a.N, a.columns, mask_of(a, b));
  if (gate) gate_fragments<kD, T>(keys, gate, true);
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
      float s[2][4] = {};
      rows_product<kD>(s, keys, tile, i);
#pragma unroll
      for (int x = 0; x < 8; x++) {
        const int column = i + x / 4 * 8 + lane % 4 * 2 + x % 2, r = x % 4 / 2;
        const float p = fast_exp2(fmaf(s[x / 4][x % 4], scale, bias[r]) - lse[column]);
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
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    const size_t limit = shared_memory_limit();
    const int chunks = static_cast<int>(ceil_div(a.N, kChunk));
    auto place = [&](int stages, int64_t rows) {
      a.stages = stages;
      a.ring_rows = static_cast<int>(rows);
      return rows * 2 * kD * sizeof(T) + stages * kChunk * sizeof(float) + (a.channel_gate ? kD * sizeof(float) : 0);
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
#include "../attention.h"
#include "ops.cuh"

namespace p3b::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Every row of t on 16 bytes, with D rounded up to 8: t itself, or a copy.
Tensor aligned(const Tensor& t) {
  const int64_t D = t.size(3), element = t.element_size();
  if (D % 8) return torch::stable::contiguous(torch::stable::pad(t, {0, 8 - D % 8}));
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && (t.stride(3) == 1 || D == 1);
  for (int axis = 0; axis < 3; axis++) fits = fits && (t.size(axis) <= 1 || t.stride(axis) * element % 16 == 0);
  if (fits) return t;
  const Tensor rows = torch::stable::contiguous(t);
  return rows.const_data_ptr() == t.const_data_ptr() ? torch::stable::clone(t) : rows;
}

// The inputs as the kernels want them; keeps alive what had to be copied.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor key_mask, token_size, channel_gate;
  AttentionArguments a{};

  Inputs(const char* op, const Attention& s, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& mask,
         const OptionalTensor& size, const OptionalTensor& gate)
      : q(aligned(q_in)),
        k(aligned(k_in)),
        v(aligned(v_in)),
        key_mask(contiguous(mask)),
        token_size(contiguous(size)),
        channel_gate(contiguous(gate)) {
    P3B_CHECK(s.D <= 128, op, ": q must have at most 128 channels per head on a GPU, got ", s.D);
    a.B = s.B;
    a.H = to_int(op, "heads", s.H);
    a.N = to_int(op, "tokens", s.N);
    a.D = static_cast<int>(s.D);
    a.columns = static_cast<int>(round_up(s.D, 8));
    a.scale = static_cast<float>(s.scale);
    a.q = q.const_data_ptr();
    a.k = k.const_data_ptr();
    a.v = v.const_data_ptr();
    a.q_strides = {q.stride(0), q.stride(1), q.stride(2)};
    a.k_strides = {k.stride(0), k.stride(1), k.stride(2)};
    a.v_strides = {v.stride(0), v.stride(1), v.stride(2)};
    a.key_mask = pointer<bool>(key_mask);
    a.token_size = pointer<float>(token_size);
    a.channel_gate = pointer<float>(channel_gate);
    a.gate_head = s.gate_per_head ? s.D : 0;
  }
};

Tensor first_channels(const Tensor& t, int64_t D) {
  if (t.size(t.dim() - 1) == D) return t;
  Tensor narrowed = t;
  narrowed = torch::stable::narrow(narrowed, t.dim() - 1, 0, D);
  return torch::stable::contiguous(narrowed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention(Tensor q, Tensor k, Tensor v, OptionalTensor key_mask, OptionalTensor token_size,
                                                                    OptionalTensor channel_gate, double scale, int64_t aux) {
  const char* op = "masked_attention";
  const Attention s = check_attention(op, q, k, &v, key_mask, token_size, channel_gate, scale);
  const OnDevice device(q);
  const Inputs in(op, s, q, k, v, key_mask, token_size, channel_gate);
  const auto rows = [&](bool wanted) { return wanted ? empty(q, {s.B, s.H, s.N}, ScalarType::Float) : empty(q, {0}, ScalarType::Float); };
  Tensor out = empty(q, {s.B, s.N, s.H, in.a.columns}, q.scalar_type());
  Tensor lse = rows(true), cls_attention = rows(aux & kClsAttention), entropy = rows(aux & kEntropy);
  Tensor squares = rows(aux & kValueNorm);
  Tensor value_norm = aux & kValueNorm ? empty(q, {s.B, s.N}, ScalarType::Float) : empty(q, {0}, ScalarType::Float);
  ForwardArguments a{};
  static_cast<AttentionArguments&>(a) = in.a;
  a.out = out.mutable_data_ptr();
  a.lse = pointer<float>(lse);
  a.cls_attention = aux & kClsAttention ? pointer<float>(cls_attention) : nullptr;
  a.entropy = aux & kEntropy ? pointer<float>(entropy) : nullptr;
  a.value_squares = aux & kValueNorm ? pointer<float>(squares) : nullptr;
  with_dtype(op, q, [&](auto zero) { check_launch(op, attention_forward<decltype(zero)>(a, device.stream)); });
  if (aux & kValueNorm) check_launch(op, attention_value_norm(a.value_squares, pointer<float>(value_norm), s.B, a.H, a.N, device.stream));
  return {first_channels(out, s.D), lse, cls_attention, entropy, value_norm};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                             OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate,
                                                             double scale) {
  const char* op = "masked_attention_backward";
  const Attention s = check_attention(op, q, k, &v, key_mask, token_size, channel_gate, scale);
  check_attention_grad(op, s, q, grad_out, out, lse);
  const OnDevice device(q);
  const Inputs in(op, s, q, k, v, key_mask, token_size, channel_gate);
  const Tensor grad_rows = torch::stable::contiguous(aligned(grad_out)), out_rows = torch::stable::contiguous(aligned(out));
  const Tensor sums = torch::stable::contiguous(lse);
  Tensor grad_qkv = empty(q, {s.B, s.N, 3, s.H, in.a.columns}, q.scalar_type());
  Tensor grad_size = token_size ? empty(q, {s.B, s.N}, ScalarType::Float) : empty(q, {0}, ScalarType::Float);
  Tensor grad_gate = !channel_gate     ? empty(q, {0}, ScalarType::Float)
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
    Tensor size_partial = empty(q, {token_size ? s.B * s.H * s.N : 0}, ScalarType::Float);
    Tensor gate_partial = empty(q, {channel_gate ? s.B * s.H * a.key_blocks * a.columns : 0}, ScalarType::Float);
    a.size_partial = token_size ? pointer<float>(size_partial) : nullptr;
    a.gate_partial = channel_gate ? pointer<float>(gate_partial) : nullptr;
    check_launch(op, attention_backward<T>(a, device.stream));
    if (token_size) check_launch(op, attention_size_grad(a, pointer<float>(grad_size), device.stream));
    if (channel_gate) check_launch(op, attention_gate_grad(a, pointer<float>(grad_gate), device.stream));
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
  m.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
  m.impl("attention_columns", TORCH_BOX(&attention_columns_op));
}

}  // namespace p3b::cuda
#endif
