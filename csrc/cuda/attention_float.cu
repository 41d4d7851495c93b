// Attention in float32 with plain FMA, never tf32: forward, columns, backward. A block of 16 x 16 threads multiplies
// tiles of kTile rows; a thread owns rows ty + 16 i, and columns tx + 16 j of a tile of logits.
#include "attention.cuh"

namespace p3b::cuda {
namespace {

constexpr int kThreads = 256;

template <int kD>
struct Tiling {
  static constexpr int kTile = kD <= 64 ? 64 : 32;  // four tiles and the weights stay below 99 KB
  static constexpr int kPer = kTile / 16;           // rows, and columns of logits, per thread
  static constexpr int kStride = kD + 4;            // floats: rows start on 16 bytes, and 16 rows miss each other's banks
  static constexpr int kChannels = kD / 16;         // per thread, from tx * kChannels on
  static constexpr int kLogits = kTile + 4;         // row of a tile of weights
};

// Starts the copy of rows [first, first + kTile) of one head; masked rows, rows beyond N and channels beyond `columns`
// become zero.
template <int kD>
__device__ __forceinline__ void load_rows(float* tile, const float* head, int64_t stride, int first, int N, int columns, const bool* mask = nullptr) {
  using Tl = Tiling<kD>;
#pragma unroll 2
  for (int i = threadIdx.x; i < Tl::kTile * (kD / 4); i += kThreads) {
    const int row = i / (kD / 4), column = i % (kD / 4) * 4;
    const bool valid = first + row < N && column < columns && (!mask || mask[first + row]);
    cp_async16(tile + row * Tl::kStride + column, valid ? head + (first + row) * stride + column : head, valid);
  }
}

// Gates what this thread copied.
template <int kD>
__device__ __forceinline__ void gate_rows(float* tile, const float* gate, bool squared) {
  for (int i = threadIdx.x; i < Tiling<kD>::kTile * (kD / 4); i += kThreads) {
    float* x = tile + i / (kD / 4) * Tiling<kD>::kStride + i % (kD / 4) * 4;
    const float* g = gate + i % (kD / 4) * 4;
#pragma unroll
    for (int c = 0; c < 4; c++) x[c] *= squared ? g[c] * g[c] : g[c];
  }
}

// s[i][j] = a[row i] . b[row j]
template <int kD>
__device__ __forceinline__ void dot_rows(float (&s)[Tiling<kD>::kPer][Tiling<kD>::kPer], const float* a, const float* b) {
  using Tl = Tiling<kD>;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < Tl::kPer; i++)
#pragma unroll
    for (int j = 0; j < Tl::kPer; j++) s[i][j] = 0;
#pragma unroll 4
  for (int d = 0; d < kD; d += 4) {
    Pack16<float> x[Tl::kPer], y[Tl::kPer];
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++) {
      x[i] = load16(a + (ty + 16 * i) * Tl::kStride + d);
      y[i] = load16(b + (tx + 16 * i) * Tl::kStride + d);
    }
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++)
#pragma unroll
      for (int j = 0; j < Tl::kPer; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[i][j] = fmaf(x[i].at[c], y[j].at[c], s[i][j]);
  }
}

template <int kD>
__device__ __forceinline__ void store_logits(float* p, const float (&s)[Tiling<kD>::kPer][Tiling<kD>::kPer]) {
  using Tl = Tiling<kD>;
#pragma unroll
  for (int i = 0; i < Tl::kPer; i++)
#pragma unroll
    for (int j = 0; j < Tl::kPer; j++) p[(threadIdx.x / 16 + 16 * i) * Tl::kLogits + threadIdx.x % 16 + 16 * j] = s[i][j];
}

// acc[i] += p[row i] . tile, this thread's channels
template <int kD>
__device__ __forceinline__ void add_rows(float (&acc)[Tiling<kD>::kPer][Tiling<kD>::kChannels], const float* p, const float* tile) {
  using Tl = Tiling<kD>;
  const int ty = threadIdx.x / 16, channel = threadIdx.x % 16 * Tl::kChannels;
#pragma unroll 1
  for (int j = 0; j < Tl::kTile; j += 4) {
    Pack16<float> w[Tl::kPer];
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++) w[i] = load16(p + (ty + 16 * i) * Tl::kLogits + j);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float x[Tl::kChannels];
#pragma unroll
      for (int d = 0; d < Tl::kChannels; d++) x[d] = tile[(j + c) * Tl::kStride + channel + d];
#pragma unroll
      for (int i = 0; i < Tl::kPer; i++)
#pragma unroll
        for (int d = 0; d < Tl::kChannels; d++) acc[i][d] = fmaf(w[i].at[c], x[d], acc[i][d]);
    }
  }
}

template <int kD>
__device__ __forceinline__ void store_channels(const float (&acc)[Tiling<kD>::kPer][Tiling<kD>::kChannels], float* head, int64_t stride, int first,
                                               int N, int columns) {
  using Tl = Tiling<kD>;
#pragma unroll
  for (int i = 0; i < Tl::kPer; i++) {
    const int row = first + threadIdx.x / 16 + 16 * i;
#pragma unroll
    for (int d = 0; d < Tl::kChannels; d++) {
      const int column = threadIdx.x % 16 * Tl::kChannels + d;
      if (row < N && column < columns) head[row * stride + column] = acc[i][d];
    }
  }
}

__device__ __forceinline__ const float* head_of(const void* p, const Strides& s, int64_t b, int h) {
  return static_cast<const float*>(p) + b * s.batch + h * s.head;
}

template <int kD>
__global__ void __launch_bounds__(kThreads, 2) float_forward_kernel(ForwardArguments a) {
  using Tl = Tiling<kD>;
  P3B_SHARED(memory);
  float* queries = reinterpret_cast<float*>(memory);
  float *keys = queries + Tl::kTile * Tl::kStride, *values = keys + Tl::kTile * Tl::kStride;
  float *weights = values + Tl::kTile * Tl::kStride, *gate = weights + Tl::kTile * Tl::kLogits;
  const int block = blockIdx.x % a.row_blocks, head = blockIdx.x / a.row_blocks, h = head % a.H;
  const int first = block * Tl::kTile, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const int64_t b = head / a.H, rows = static_cast<int64_t>(head) * a.N;
  const bool gated = a.channel_gate;
  const bool* mask = mask_of(a, b);
  if (gated) load_gate(a, h, gate, kD);
  load_rows<kD>(queries, head_of(a.q, a.q_strides, b, h), a.q_strides.row, first, a.N, a.columns);
  __syncthreads();

  float o[Tl::kPer][Tl::kChannels] = {}, m[Tl::kPer], l[Tl::kPer] = {}, e[Tl::kPer] = {};
#pragma unroll
  for (int i = 0; i < Tl::kPer; i++) m[i] = kUnset;
  const float scale = a.scale * kLog2e;
  for (int j0 = 0; j0 < a.N; j0 += Tl::kTile) {
    load_rows<kD>(keys, head_of(a.k, a.k_strides, b, h), a.k_strides.row, j0, a.N, a.columns, mask);
    load_rows<kD>(values, head_of(a.v, a.v_strides, b, h), a.v_strides.row, j0, a.N, a.columns, mask);
    cp_async_commit();
    cp_async_wait(0);
    if (gated) gate_rows<kD>(keys, gate, true);
    __syncthreads();
    if (a.value_squares && block == 0) {
      for (int row = threadIdx.x / 4; row < Tl::kTile; row += kThreads / 4) {
        float sum = 0;
        const bool masked = mask && j0 + row < a.N && !mask[j0 + row];  // has a value too, which is not in the tile
        const float* from = masked ? head_of(a.v, a.v_strides, b, h) + (j0 + row) * a.v_strides.row : values + row * Tl::kStride;
        for (int d = threadIdx.x % 4; d < a.columns; d += 4) {
          const float x = from[d] * (gated ? gate[d] : 1.f);
          sum = fmaf(x, x, sum);
        }
        sum = group_sum(sum, 4);
        if (threadIdx.x % 4 == 0 && j0 + row < a.N) a.value_squares[rows + j0 + row] = sum;
      }
    }
    float s[Tl::kPer][Tl::kPer];
    dot_rows<kD>(s, queries, keys);
#pragma unroll
    for (int j = 0; j < Tl::kPer; j++) {
      const float bias = key_bias(a, b, j0 + tx + 16 * j);
#pragma unroll
      for (int i = 0; i < Tl::kPer; i++) s[i][j] = fmaf(s[i][j], scale, bias);
      // Row 0's logits wait in its output until the sum is known; each thread reads back what it wrote.
      if (a.cls_attention && first + ty == 0 && j0 + tx + 16 * j < a.N) a.cls_attention[rows + j0 + tx + 16 * j] = s[0][j];
    }
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++) {
      float top = m[i];
#pragma unroll
      for (int j = 0; j < Tl::kPer; j++) top = fmaxf(top, s[i][j]);
      top = group_max(top, 16);
      const float shift = m[i] - top, factor = fast_exp2(shift);
      e[i] = (e[i] + l[i] * shift) * factor;
      l[i] *= factor;
      m[i] = top;
#pragma unroll
      for (int d = 0; d < Tl::kChannels; d++) o[i][d] *= factor;
#pragma unroll
      for (int j = 0; j < Tl::kPer; j++) {
        const float x = s[i][j] - top;
        s[i][j] = fast_exp2(x);
        l[i] += s[i][j];
        e[i] = fmaf(s[i][j], x, e[i]);
      }
    }
    store_logits<kD>(weights, s);
    __syncthreads();
    add_rows<kD>(o, weights, values);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < Tl::kPer; i++) {
    const float sum = group_sum(l[i], 16), moment = group_sum(e[i], 16), inverse = sum == 0 ? 0.f : 1.f / sum;
#pragma unroll
    for (int d = 0; d < Tl::kChannels; d++) o[i][d] *= inverse * (gated ? gate[tx * Tl::kChannels + d] : 1.f);
    const int n = first + ty + 16 * i;
    if (tx == 0 && n < a.N) {
      const float log_sum = log2f(sum), entropy = (log_sum - moment * inverse) * kLn2;
      a.lse[rows + n] = sum == 0 ? -INFINITY : (m[i] + log_sum) * kLn2;
      if (a.entropy) a.entropy[rows + n] = sum == 0 ? 0.f : entropy < 0 ? 0.f : entropy;
    }
    if (a.cls_attention && n == 0)
      for (int j = tx; j < a.N; j += 16) a.cls_attention[rows + j] = fast_exp2(a.cls_attention[rows + j] - m[i]) * inverse;
  }
  float* out = static_cast<float*>(a.out) + (b * a.N * a.H + h) * a.columns;
  store_channels<kD>(o, out, static_cast<int64_t>(a.H) * a.columns, first, a.N, a.columns);
}

template <int kD>
__global__ void __launch_bounds__(kThreads) float_columns_kernel(ColumnArguments a) {
  using Tl = Tiling<kD>;
  P3B_SHARED(memory);
  float* keys = reinterpret_cast<float*>(memory);
  float *queries = keys + Tl::kTile * Tl::kStride, *gate = queries + Tl::kTile * Tl::kStride;
  const int block = blockIdx.x % a.row_blocks, head = blockIdx.x / a.row_blocks, h = head % a.H;
  const int first = block * Tl::kTile, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const int64_t b = head / a.H, rows = static_cast<int64_t>(head) * a.N;
  if (a.channel_gate) load_gate(a, h, gate, kD);
  __syncthreads();
  load_rows<kD>(keys, head_of(a.k, a.k_strides, b, h), a.k_strides.row, first, a.N, a.columns, mask_of(a, b));
  cp_async_commit();
  cp_async_wait(0);
  if (a.channel_gate) gate_rows<kD>(keys, gate, true);
  float sum[Tl::kPer] = {};
  for (int i0 = 0; i0 < a.N; i0 += Tl::kTile) {
    load_rows<kD>(queries, head_of(a.q, a.q_strides, b, h), a.q_strides.row, i0, a.N, a.columns);
    cp_async_commit();
    cp_async_wait(0);
    __syncthreads();
    float s[Tl::kPer][Tl::kPer];
    dot_rows<kD>(s, keys, queries);
#pragma unroll
    for (int j = 0; j < Tl::kPer; j++) {
      const int column = i0 + tx + 16 * j;
      const float lse = row_lse(a, a.lse, head, column);
#pragma unroll
      for (int i = 0; i < Tl::kPer; i++) {
        const int n = first + ty + 16 * i;
        const float p = fast_exp2(fmaf(s[i][j], a.scale * kLog2e, key_bias(a, b, n)) - lse);
        sum[i] += p;
        if (a.to_cls && n == 0 && column < a.N) a.to_cls[rows + column] = p;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < Tl::kPer; i++) {
    const float total = group_sum(sum[i], 16);
    const int n = first + ty + 16 * i;
    if (a.received && tx == 0 && n < a.N) a.received[rows + n] = total / a.N;
  }
}

// keys_here: a block owns kTile keys and goes over the queries; else the other way round. See attention_backward.cu.
template <int kD, bool keys_here>
__device__ __forceinline__ void float_backward_jobs(const BackwardArguments& a, unsigned char* memory, int block, int head) {
  using Tl = Tiling<kD>;
  constexpr int kSize = Tl::kTile * Tl::kStride;
  float* one = reinterpret_cast<float*>(memory);                          // own rows: k, or q
  float *two = one + kSize, *three = two + kSize, *four = three + kSize;  // own v or grad_out; the others' two
  float *weights = four + kSize, *gate = weights + Tl::kTile * Tl::kLogits;
  const int h = head % a.H, first = block * Tl::kTile, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const int64_t b = head / a.H, rows = static_cast<int64_t>(head) * a.N;
  const int64_t out_row = static_cast<int64_t>(a.H) * a.columns;
  const Strides out_strides{a.N * out_row, a.columns, out_row};
  const bool gated = a.channel_gate;
  const float *q = head_of(a.q, a.q_strides, b, h), *k = head_of(a.k, a.k_strides, b, h);
  const float *v = head_of(a.v, a.v_strides, b, h), *grad_out = head_of(a.grad_out, out_strides, b, h);
  const bool* mask = mask_of(a, b);
  const bool *own_mask = keys_here ? mask : nullptr, *other_mask = keys_here ? nullptr : mask;
  if (gated) load_gate(a, h, gate, kD);
  __syncthreads();
  load_rows<kD>(one, keys_here ? k : q, keys_here ? a.k_strides.row : a.q_strides.row, first, a.N, a.columns, own_mask);
  load_rows<kD>(two, keys_here ? v : grad_out, keys_here ? a.v_strides.row : out_row, first, a.N, a.columns, own_mask);
  cp_async_commit();
  cp_async_wait(0);
  if (gated && keys_here) {
    gate_rows<kD>(one, gate, true);
    gate_rows<kD>(two, gate, false);
  }

  float grad_one[Tl::kPer][Tl::kChannels] = {}, grad_two[Tl::kPer][Tl::kChannels] = {}, sum[Tl::kPer] = {};
  for (int i0 = 0; i0 < a.N; i0 += Tl::kTile) {
    load_rows<kD>(three, keys_here ? q : k, keys_here ? a.q_strides.row : a.k_strides.row, i0, a.N, a.columns, other_mask);
    load_rows<kD>(four, keys_here ? grad_out : v, keys_here ? out_row : a.v_strides.row, i0, a.N, a.columns, other_mask);
    cp_async_commit();
    cp_async_wait(0);
    if (gated && !keys_here) {
      gate_rows<kD>(three, gate, true);
      gate_rows<kD>(four, gate, false);
    }
    __syncthreads();
    float p[Tl::kPer][Tl::kPer], ds[Tl::kPer][Tl::kPer];
    dot_rows<kD>(p, one, three);
    dot_rows<kD>(ds, two, four);
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++)
#pragma unroll
      for (int j = 0; j < Tl::kPer; j++) {
        const int own = first + ty + 16 * i, other = i0 + tx + 16 * j, key = keys_here ? own : other;
        const int query = keys_here ? other : own;
        p[i][j] = fast_exp2(fmaf(p[i][j], a.scale * kLog2e, key_bias(a, b, key)) - row_lse(a, a.lse, head, query));
        ds[i][j] = p[i][j] * (ds[i][j] - (query < a.N ? a.delta[rows + query] : 0.f));
        sum[i] += ds[i][j];
      }
    if (keys_here) {
      store_logits<kD>(weights, p);
      __syncthreads();
      add_rows<kD>(grad_two, weights, four);
      __syncthreads();
    }
    store_logits<kD>(weights, ds);
    __syncthreads();
    add_rows<kD>(grad_one, weights, three);
    __syncthreads();
  }

  float* grad = static_cast<float*>(a.grad_qkv) + b * a.N * 3 * out_row + h * a.columns;
  if constexpr (!keys_here) {
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++)
#pragma unroll
      for (int d = 0; d < Tl::kChannels; d++) grad_one[i][d] *= a.scale;
    store_channels<kD>(grad_one, grad, 3 * out_row, first, a.N, a.columns);
  } else {
#pragma unroll
    for (int i = 0; i < Tl::kPer; i++) {
      const int n = first + ty + 16 * i;
      const float total = group_sum(sum[i], 16);
      if (a.size_partial && tx == 0 && n < a.N) a.size_partial[rows + n] = total;
    }
#pragma unroll
    for (int d = 0; d < Tl::kChannels; d++) {
      const int column = tx * Tl::kChannels + d;
      const float g = gated ? gate[column] : 1.f;
      float of_gate = 0;
#pragma unroll
      for (int i = 0; i < Tl::kPer; i++) {
        const int n = first + ty + 16 * i;
        if (a.gate_partial && n < a.N && column < a.columns && (!mask || mask[n]))
          of_gate += 2 * a.scale * g * k[n * a.k_strides.row + column] * grad_one[i][d] + v[n * a.v_strides.row + column] * grad_two[i][d];
        grad_one[i][d] *= a.scale * g * g;
        grad_two[i][d] *= g;
      }
      if (a.gate_partial) three[ty * kD + column] = of_gate;  // [16][kD], free since the loop
    }
    store_channels<kD>(grad_one, grad + out_row, 3 * out_row, first, a.N, a.columns);
    store_channels<kD>(grad_two, grad + 2 * out_row, 3 * out_row, first, a.N, a.columns);
    if (a.gate_partial) {
      __syncthreads();
      for (int d = threadIdx.x; d < a.columns; d += kThreads) {
        float total = 0;
        for (int y = 0; y < 16; y++) total += three[y * kD + d];
        a.gate_partial[(static_cast<int64_t>(head) * a.key_blocks + block) * a.columns + d] = total;
      }
    }
  }
}

template <int kD>
__global__ void __launch_bounds__(kThreads, 1) float_backward_kernel(BackwardArguments a) {
  P3B_SHARED(memory);
  const int blocks = a.key_blocks + a.query_blocks, block = blockIdx.x % blocks, head = blockIdx.x / blocks;
  if (block < a.key_blocks)
    float_backward_jobs<kD, true>(a, memory, block, head);
  else
    float_backward_jobs<kD, false>(a, memory, block - a.key_blocks, head);
}

__global__ void __launch_bounds__(kThreads) float_delta_kernel(BackwardArguments a) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 8;  // of [B, N, H]
  const bool valid = row < a.B * a.N * a.H;
  const float* grad = static_cast<const float*>(a.grad_out) + row * a.columns;
  const float* out = static_cast<const float*>(a.out) + row * a.columns;
  float sum = 0;
  for (int c = threadIdx.x % 8; c < a.columns && valid; c += 8) sum = fmaf(grad[c], out[c], sum);
  sum = group_sum(sum, 8);
  if (valid && threadIdx.x % 8 == 0) a.delta[(row / a.H / a.N * a.H + row % a.H) * a.N + row / a.H % a.N] = sum;
}

template <int kD>
size_t bytes_of(int tiles, bool weights) {
  using Tl = Tiling<kD>;
  return (tiles * Tl::kTile * Tl::kStride + (weights ? Tl::kTile * Tl::kLogits : 0) + kD) * sizeof(float);
}

}  // namespace

template <>
cudaError_t attention_forward<float>(ForwardArguments a, cudaStream_t stream) {
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    a.row_blocks = static_cast<int>(ceil_div(a.N, Tiling<kD>::kTile));
    return launch(float_forward_kernel<kD>, a.B * a.H * a.row_blocks, kThreads, bytes_of<kD>(3, true), stream, a);
  });
}

template <>
cudaError_t attention_columns<float>(ColumnArguments a, cudaStream_t stream) {
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    a.row_blocks = a.received ? static_cast<int>(ceil_div(a.N, Tiling<kD>::kTile)) : 1;
    return launch(float_columns_kernel<kD>, a.B * a.H * a.row_blocks, kThreads, bytes_of<kD>(2, false), stream, a);
  });
}

template <>
int attention_key_blocks<float>(int N, int columns) {
  int blocks = 0;
  with_width(columns, [&](auto width) {
    blocks = static_cast<int>(ceil_div(N, Tiling<decltype(width)::value>::kTile));
    return cudaSuccess;
  });
  return blocks;
}

template <>
cudaError_t attention_backward<float>(BackwardArguments a, cudaStream_t stream) {
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    a.key_blocks = a.query_blocks = attention_key_blocks<float>(a.N, a.columns);
    const cudaError_t error = launch(float_delta_kernel, ceil_div(a.B * a.N * a.H * 8, kThreads), kThreads, 0, stream, a);
    if (error != cudaSuccess) return error;
    return launch(float_backward_kernel<kD>, a.B * a.H * (a.key_blocks + a.query_blocks), kThreads, bytes_of<kD>(4, true), stream, a);
  });
}

}  // namespace p3b::cuda
