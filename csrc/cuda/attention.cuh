// What the attention kernels share: arguments, tiles of 16-bit rows in shared memory, fragments in registers.
// Logits are kept in units of log2, so that every exponential is one ex2 instruction.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace p3b::cuda {

struct Strides {
  int64_t batch, head, row;  // in elements; channels are contiguous
};

struct AttentionArguments {
  int64_t B;
  int H, N;
  int D, columns;  // channels, and channels rounded up to 8: every row of every tensor has `columns`, the rest zero
  float scale;
  const void *q, *k, *v;  // each row starts on 16 bytes
  Strides q_strides, k_strides, v_strides;
  const bool* key_mask;       // [B, N] or null
  const float* token_size;    // [B, N] or null
  const float* channel_gate;  // [D] (gate_head = 0), [H, D] (gate_head = D) or null
  int64_t gate_head;
};

struct ForwardArguments : AttentionArguments {
  void* out;             // [B, N, H, columns]
  float* lse;            // [B, H, N]
  float* cls_attention;  // [B, H, N] or null
  float* entropy;        // [B, H, N] or null
  float* value_squares;  // [B, H, N] or null: sum over a head's channels of (gate v)^2
  int row_blocks, rounds, stages, ring_rows;
};

struct BackwardArguments : AttentionArguments {
  const void *grad_out, *out;  // [B, N, H, columns]
  const float* lse;            // [B, H, N]
  float* delta;                // [B, H, N] scratch
  void* grad_qkv;              // [B, N, 3, H, columns]
  float* size_partial;         // [B, H, N] or null: sum over queries of the logits' gradients
  float* gate_partial;         // [B, H, key_blocks, columns] or null
  int key_blocks, query_blocks;
};

struct ColumnArguments : AttentionArguments {
  const float* lse;
  float *to_cls, *received;  // [B, H, N] or null
  int row_blocks;
};

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// A masked key adds kMasked to its logit; a row's running maximum starts at kUnset, far above that and far below any
// logit, so that masked keys weigh exactly 0 without an infinity that could turn into NaN.
constexpr float kMasked = -1e30f, kUnset = -1e29f;
// The number of this warp, in a way that tells the compiler that all lanes agree on it.
__device__ __forceinline__ int warp_number() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0); }

constexpr int kChunk = 64;  // rows of one stage of shared memory

__device__ __forceinline__ float key_bias(const AttentionArguments& a, int64_t b, int n) {
  if (n >= a.N || (a.key_mask && !a.key_mask[b * a.N + n])) return kMasked;
  return a.token_size ? log2f(a.token_size[b * a.N + n]) : 0.f;
}

// The key mask of one image, or null. Rows that it forbids are not read but taken as zeros: 0 * NaN would be NaN.
__device__ __forceinline__ const bool* mask_of(const AttentionArguments& a, int64_t b) { return a.key_mask ? a.key_mask + b * a.N : nullptr; }

// log2-sum-exp2 of a query; a row without keys or beyond N gives weight 0 to everything.
__device__ __forceinline__ float row_lse(const AttentionArguments& a, const float* lse, int64_t head, int n) {
  if (n >= a.N) return -kMasked;
  const float x = lse[head * a.N + n];
  return x == -INFINITY ? 0.f : x * kLog2e;
}

// Tiles hold rows of kD channels in pieces of 16 bytes. The pieces of a row are permuted by its number, so that eight
// rows of one column touch all banks: ldmatrix and 16-byte accesses run without conflicts and without padding.
template <int kD>
__device__ __forceinline__ int tile_offset(int row, int piece) {
  const int swizzled = kD % 64 == 0 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
  return row * kD + swizzled * 8;
}

// Starts the copy of rows [first, first + rows) of one head; masked rows, rows beyond N and channels beyond `columns`
// become zero.
template <int kD, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* head, int64_t stride, int first, int rows, int N, int columns,
                                          const bool* mask = nullptr) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (kD / 8); i += blockDim.x) {
    const int row = i / (kD / 8), piece = i % (kD / 8);
    const bool valid = first + row < N && piece * 8 < columns && (!mask || mask[first + row]);
    cp_async16(tile + tile_offset<kD>(row, piece), valid ? head + (first + row) * stride + piece * 8 : head, valid);
  }
}

// A operand of mma: 16 rows of a tile.
template <int kD, class T>
__device__ __forceinline__ void tile_fragments(uint32_t (&f)[kD / 16][4], const T* tile, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int kk = 0; kk < kD / 16; kk++) ldmatrix_x4<false>(f[kk], tile + tile_offset<kD>(first + lane % 16, kk * 2 + lane / 16));
}

// Multiplies 8 channels by their gates, or by the squares: q and k carry one each, and k takes both.
template <class T>
__device__ __forceinline__ void gate_piece(T* piece, const float* gate, bool squared) {
  Pack16<T> x = load16(piece);
#pragma unroll
  for (int i = 0; i < 8; i++) x.at[i] = from_float<T>(to_float(x.at[i]) * (squared ? gate[i] * gate[i] : gate[i]));
  store16(piece, x);
}

// Gates the pieces that this thread itself copied with load_tile: no barrier is needed in between.
template <int kD, class T>
__device__ __forceinline__ void gate_tile(T* tile, int rows, const float* gate, bool squared) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (kD / 8); i += blockDim.x)
    gate_piece(tile + tile_offset<kD>(i / (kD / 8), i % (kD / 8)), gate + i % (kD / 8) * 8, squared);
}

// gate[kD] of one head in shared memory, 0 beyond D. The caller's barrier makes it visible.
__device__ __forceinline__ void load_gate(const AttentionArguments& a, int h, float* gate, int width) {
  for (int d = threadIdx.x; d < width; d += blockDim.x) gate[d] = d < a.D ? a.channel_gate[h * a.gate_head + d] : 0.f;
}

// A operand of mma: 16 rows of one head straight from global memory, 16 bytes per lane; zeros as in load_tile.
template <int kD, class T>
__device__ __forceinline__ void load_fragments(uint32_t (&f)[kD / 16][4], const T* head, int64_t stride, int first, int N, int columns,
                                               const bool* mask = nullptr) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first + lane / 4 + 8 * r;
    const bool valid = row < N && (!mask || mask[row]);
#pragma unroll
    for (int g = 0; g < kD / 32; g++) {
      const int column = (g * 4 + lane % 4) * 8;
      uint4 raw = {0, 0, 0, 0};
      if (valid && column < columns) raw = *reinterpret_cast<const uint4*>(head + row * stride + column);
      uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
      quad_transpose(w);
#pragma unroll
      for (int i = 0; i < 4; i++) f[(g * 4 + i) / 2][r + 2 * (i & 1)] = w[i];
    }
  }
}

// Channels of fragment register i of step kk are column, column + 1.
__device__ __forceinline__ int fragment_column(int kk, int i) { return kk * 16 + i / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2; }

template <int kD, class T>
__device__ __forceinline__ void gate_fragments(uint32_t (&f)[kD / 16][4], const float* gate, bool squared) {
#pragma unroll
  for (int kk = 0; kk < kD / 16; kk++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack<T>(f[kk][i]);
      float g0 = gate[fragment_column(kk, i)], g1 = gate[fragment_column(kk, i) + 1];
      if (squared) g0 *= g0, g1 *= g1;
      f[kk][i] = pack<T>(x.x * g0, x.y * g1);
    }
}

// Accumulators of 16 rows to 16 rows of T, 16 bytes per lane.
template <int kD, class T>
__device__ __forceinline__ void store_rows(const float (&acc)[kD / 8][4], T* head, int64_t stride, int first, int N, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first + lane / 4 + 8 * r;
#pragma unroll
    for (int g = 0; g < kD / 32; g++) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack<T>(acc[g * 4 + i][2 * r], acc[g * 4 + i][2 * r + 1]);
      quad_transpose(w);
      const int column = (g * 4 + lane % 4) * 8;
      if (row < N && column < columns) *reinterpret_cast<uint4*>(head + row * stride + column) = {w[0], w[1], w[2], w[3]};
    }
  }
}

// s[i] = a[16, kD] . row[j0 + 8 i .. j0 + 8 i + 8)^T for two groups of eight rows of a tile.
template <int kD, class T>
__device__ __forceinline__ void rows_product(float (&s)[2][4], const uint32_t (&a)[kD / 16][4], const T* tile, int j0) {
  const int lane = threadIdx.x % 32, row = j0 + lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int kk = 0; kk < kD / 16; kk++) {
    uint32_t f[4];
    ldmatrix_x4<false>(f, tile + tile_offset<kD>(row, kk * 2 + lane / 8 % 2));
    mma_16816<T>(s[0], a[kk], {f[0], f[1]});
    mma_16816<T>(s[1], a[kk], {f[2], f[3]});
  }
}

// acc[16, kD] += p[16, 16] . tile[j0 .. j0 + 16)
template <int kD, class T>
__device__ __forceinline__ void columns_product(float (&acc)[kD / 8][4], const uint32_t (&p)[4], const T* tile, int j0) {
  const int lane = threadIdx.x % 32, row = j0 + lane % 16;
#pragma unroll
  for (int d = 0; d < kD / 16; d++) {
    uint32_t f[4];
    ldmatrix_x4<true>(f, tile + tile_offset<kD>(row, d * 2 + lane / 16));
    mma_16816<T>(acc[2 * d], p, {f[0], f[1]});
    mma_16816<T>(acc[2 * d + 1], p, {f[2], f[3]});
  }
}

// The accumulator of two products of 8 columns is the A operand of a product over those 16.
template <class T>
__device__ __forceinline__ void pack_fragment(uint32_t (&p)[4], const float (&s)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) p[i] = pack<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
}

// Calls f with a compile-time width that holds D channels.
template <class F>
cudaError_t with_width(int D, F f) {
  if (D <= 32) return f(std::integral_constant<int, 32>());
  if (D <= 64) return f(std::integral_constant<int, 64>());
  if (D <= 96) return f(std::integral_constant<int, 96>());
  if (D <= 128) return f(std::integral_constant<int, 128>());
  return cudaErrorInvalidValue;
}

// From this many heads on, heads alone fill an H200; below, the queries of a head are split. A test may lower it.
inline int many_heads = 256;

// Launches; instantiated for __half, __nv_bfloat16 (tensor cores) and float (plain FMA).
template <class T>
cudaError_t attention_forward(ForwardArguments a, cudaStream_t stream);
template <class T>
cudaError_t attention_backward(BackwardArguments a, cudaStream_t stream);
template <class T>
cudaError_t attention_columns(ColumnArguments a, cudaStream_t stream);

// How the backward cuts the keys of a head into blocks: the size of gate_partial.
template <class T>
int attention_key_blocks(int N, int columns);

// value_norm[b, n] = sqrt(sum over h of squares[b, h, n])
cudaError_t attention_value_norm(const float* squares, float* value_norm, int64_t B, int H, int N, cudaStream_t stream);
// grad_size[b, n] = sum over h of size_partial[b, h, n] / token_size[b, n]
cudaError_t attention_size_grad(const BackwardArguments& a, float* grad_size, cudaStream_t stream);
// grad_gate [D] or [H, D] = sum of gate_partial over everything else
cudaError_t attention_gate_grad(const BackwardArguments& a, float* grad_gate, cudaStream_t stream);

}  // namespace p3b::cuda
