// What the attention kernels share: arguments, tiles of 16-bit rows in shared memory, fragments in registers.
// Logits are kept in units of log2, so that every exponential is one ex2 instruction.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.cuh"

namespace p3b::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Strides {
  int64_t batch, head, row;  // in elements; channels are contiguous
};

// The scale that exponents see is positive, as numbers are divided by it: of one that is not, one operand of the logits
// takes the sign, or becomes zeros (below 1e-20 a scale counts as 0). Times log2(e).
struct PositiveScale {
  float scale, inverse;
  float masked, unset;  // kMasked before the scale, and kUnset behind it, where neither they nor their products overflow
  bool flat, flip;
};
inline PositiveScale positive_scale(float x) {
  const bool flat = std::fabs(x) < 1e-20f;
  const float scale = flat ? 1.f : std::fabs(x) * kLog2e, masked = -std::fmin(1e30f, 1e37f / scale);
  return {scale, 1 / scale, masked, masked * scale / 10, flat, x < 0};
}

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
  PositiveScale positive;  // of scale; the launch fills it in
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
  int jobs, rows;  // of one kind, and N rounded up to 16, where a block has a whole head
};

struct ColumnArguments : AttentionArguments {
  const float* lse;
  float *to_cls, *received;  // [B, H, N] or null
  int row_blocks;
};

// A masked key adds kMasked to its logit; a row's running maximum starts at kUnset (16 bits: both as in PositiveScale), far above that and far below
// any logit, so that masked keys weigh exactly 0 without an infinity that could turn into NaN.
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

// The same as an initial value of products, before the scale.
__device__ __forceinline__ float before_scale(const AttentionArguments& a, float x) {
  return x == kMasked ? a.positive.masked : x * a.positive.inverse;
}

// Applies the sign of the scale, or a scale of 0, to the operand of the logits that is in registers.
template <class T, int kSteps>
__device__ __forceinline__ void apply_sign(const AttentionArguments& a, uint32_t (&f)[kSteps][4]) {
  if (!a.positive.flat && !a.positive.flip) return;
#pragma unroll
  for (int kk = 0; kk < kSteps; kk++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack<T>(f[kk][i]);
      f[kk][i] = a.positive.flat ? pack<T>(x.x * 0, x.y * 0) : f[kk][i] ^ 0x80008000u;  // NaN stays
    }
}

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

// The place of this lane's 16 bytes for ldmatrix. Matrices 0 to 3 of 16 rows and 16 channels: in `by_rows`, eight rows'
// two halves of the channels, then those of the next eight rows: B operands of a product with rows^T. In `by_channels`,
// eight channels of all rows, then the next eight: A operands, and transposed B operands of a product with the rows.
template <int kD, class T>
__device__ __forceinline__ SharedAddress by_rows(const T* tile, int first) {
  const int lane = threadIdx.x % 32;
  return shared_address(tile + tile_offset<kD>(first + lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
template <int kD, class T>
__device__ __forceinline__ SharedAddress by_channels(const T* tile, int first) {
  const int lane = threadIdx.x % 32;
  return shared_address(tile + tile_offset<kD>(first + lane % 16, lane / 16));
}
// Eight rows and 32 channels: B operands of two steps of the product with rows^T.
template <int kD, class T>
__device__ __forceinline__ SharedAddress by_eight(const T* tile, int first) {
  const int lane = threadIdx.x % 32;
  return shared_address(tile + tile_offset<kD>(first + lane % 8, lane / 8));
}

// The same rows, 16 kk channels further: tile_offset at piece + 2 kk, with one instruction. Rows that lie a multiple of 8
// further are as many rows of kD further.
template <int kD>
__device__ __forceinline__ SharedAddress at_channels(SharedAddress base, int kk) {
  constexpr int kSwizzled = kD % 64 == 0 ? 4 : 2;  // steps of 16 channels among which the swizzle permutes
  return (base ^ kk % kSwizzled * 32) + kk / kSwizzled * (kSwizzled * 32);
}

// Calls f(row, piece) for this thread's share of the pieces of `rows` rows, the same share in every function.
template <int kD, class F>
__device__ __forceinline__ void each_piece(int rows, F f) {
  constexpr int kPieces = kD / 8;
  if constexpr (kPieces & (kPieces - 1)) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * kPieces; i += blockDim.x) f(i / kPieces, i % kPieces);
  } else {
    const int piece = threadIdx.x % kPieces;
#pragma unroll 1
    for (int row = threadIdx.x / kPieces; row < rows; row += blockDim.x / kPieces) f(row, piece);
  }
}

// Starts the copy of rows [first, first + rows) of one head; masked rows, rows beyond N and channels beyond `columns`
// become zero.
template <int kD, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* head, int64_t stride, int first, int rows, int N, int columns,
                                          const bool* mask = nullptr) {
  constexpr int kPieces = kD / 8;
  if (mask || kPieces & (kPieces - 1)) {
    each_piece<kD>(rows, [&](int row, int piece) {
      const bool valid = first + row < N && piece * 8 < columns && (!mask || mask[first + row]);
      cp_async16(tile + tile_offset<kD>(row, piece), valid ? head + (first + row) * stride + piece * 8 : head, valid);
    });
    return;
  }
  // All pieces of a thread lie in one column: nothing is multiplied in the loop.
  const int piece = threadIdx.x % kPieces, step = blockDim.x / kPieces, end = piece * 8 < columns ? N - first : 0;
  int row = threadIdx.x / kPieces;
  const T* from = head + (first + row) * stride + piece * 8;
  const int64_t jump = step * stride;
#pragma unroll 1
  for (; row < rows; row += step, from += jump) cp_async16(tile + tile_offset<kD>(row, piece), row < end ? from : head, row < end);
}

// A operand of mma: 16 rows of a tile.
template <int kD, class T>
__device__ __forceinline__ void tile_fragments(uint32_t (&f)[kD / 16][4], const T* tile, int first) {
  const SharedAddress base = by_channels<kD>(tile, first);
#pragma unroll
  for (int kk = 0; kk < kD / 16; kk++) ldmatrix_x4<false>(f[kk], at_channels<kD>(base, kk));
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
  each_piece<kD>(rows, [&](int row, int piece) { gate_piece(tile + tile_offset<kD>(row, piece), gate + piece * 8, squared); });
}

// gate[kD] of one head in shared memory, 0 beyond D. The caller's barrier makes it visible.
__device__ __forceinline__ void load_gate(const AttentionArguments& a, int h, float* gate, int width) {
  for (int d = threadIdx.x; d < width; d += blockDim.x) gate[d] = d < a.D ? a.channel_gate[h * a.gate_head + d] : 0.f;
}

// The first of the four channels that pair_transpose gives this lane, of 16.
__device__ __forceinline__ int paired_column() { return threadIdx.x % 2 * 8 + threadIdx.x / 2 % 2 * 4; }

// A operand of mma: 16 rows of one head straight from global memory, 8 bytes per lane; zeros as in load_tile.
template <int kD, class T>
__device__ __forceinline__ void load_fragments(uint32_t (&f)[kD / 16][4], const T* head, int64_t stride, int first, int N, int columns,
                                               const bool* mask = nullptr) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first + threadIdx.x % 32 / 4 + 8 * r;
    const int left = row < N && (!mask || mask[row]) ? columns - paired_column() : 0;
    const T* from = head + row * stride + paired_column();
#pragma unroll
    for (int kk = 0; kk < kD / 16; kk++) {
      uint2 raw = {0, 0};
      if (kk * 16 < left) raw = *reinterpret_cast<const uint2*>(from + kk * 16);
      pair_transpose(raw.x, raw.y);
      f[kk][r] = raw.x, f[kk][r + 2] = raw.y;
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

// Accumulators of 16 rows to 16 rows of T, 8 bytes per lane.
template <int kD, class T>
__device__ __forceinline__ void store_rows(const float (&acc)[kD / 8][4], T* head, int64_t stride, int first, int N, int columns) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first + threadIdx.x % 32 / 4 + 8 * r;
    const int left = row < N ? columns - paired_column() : 0;
    T* to = head + row * stride + paired_column();
#pragma unroll
    for (int kk = 0; kk < kD / 16; kk++) {
      uint2 raw = {pack<T>(acc[2 * kk][2 * r], acc[2 * kk][2 * r + 1]), pack<T>(acc[2 * kk + 1][2 * r], acc[2 * kk + 1][2 * r + 1])};
      pair_transpose(raw.x, raw.y);
      if (kk * 16 < left) *reinterpret_cast<uint2*>(to + kk * 16) = raw;
    }
  }
}

// s[t][i] = initial(t, i) + a[t] . row[8 i .. 8 i + 8)^T: tiles of 16 rows in registers against 8 kGroups rows of a tile in
// shared memory, given by_rows (two groups) or by_eight (one). Every operand that comes from there serves all kTiles
// products.
template <class T, int kD, int kTiles, int kGroups, class Initial>
__device__ __forceinline__ void rows_product(float (&s)[kTiles][kGroups][4], const uint32_t (&a)[kTiles][kD / 16][4], SharedAddress rows,
                                             Initial initial, int further = 0) {
  constexpr int kSteps = 2 / kGroups;  // of 16 channels, that one ldmatrix feeds
#pragma unroll
  for (int k0 = 0; k0 < kD / 16; k0 += kSteps) {
    uint32_t f[4];
    ldmatrix_x4<false>(f, at_channels<kD>(rows, k0) + further);
#pragma unroll
    for (int x = 0; x < 2; x++) {
      const int kk = k0 + x % kSteps, i = x % kGroups;
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        if (kk == 0)
          mma_16816<T>(s[t][i], a[t][kk], {f[2 * x], f[2 * x + 1]}, initial(t, i).at);
        else
          mma_16816<T>(s[t][i], a[t][kk], {f[2 * x], f[2 * x + 1]});
      }
    }
  }
}

// acc[t][16, kD] += p[t][16, 16] . 16 rows of a tile, given by_channels.
template <class T, int kD, int kTiles>
__device__ __forceinline__ void channels_product(float (&acc)[kTiles][kD / 8][4], const uint32_t (&p)[kTiles][4], SharedAddress rows,
                                                 int further = 0) {
#pragma unroll
  for (int d = 0; d < kD / 16; d++) {
    uint32_t f[4];
    ldmatrix_x4<true>(f, at_channels<kD>(rows, d) + further);
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      mma_16816<T>(acc[t][2 * d], p[t], {f[0], f[1]});
      mma_16816<T>(acc[t][2 * d + 1], p[t], {f[2], f[3]});
    }
  }
}

// Accumulators of a product over 8 columns are half of the A operand of a product over 16.
template <class T, int kTiles>
__device__ __forceinline__ void pack_half(uint32_t (&p)[kTiles][4], int half, const float (&s)[kTiles][1][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) p[t][half * 2 + i] = pack<T>(s[t][0][i * 2], s[t][0][i * 2 + 1]);
}

// All of it; the half that is not there is zeros.
template <class T, int kTiles, int kGroups>
__device__ __forceinline__ void pack_fragments(uint32_t (&p)[kTiles][4], const float (&s)[kTiles][kGroups][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[t][i] = i < kGroups * 2 ? pack<T>(s[t][i / 2 % kGroups][i % 2 * 2], s[t][i / 2 % kGroups][i % 2 * 2 + 1]) : 0;
}

// A number for each column of a tile of logits, as initial values of products: [pairs of columns][4], each pair twice.
struct Initial4 {
  float at[4];
};
__device__ __forceinline__ void store_column(float* columns, int n, float x) { columns[n / 2 * 4 + n % 2] = columns[n / 2 * 4 + n % 2 + 2] = x; }
__device__ __forceinline__ float load_column(const float* columns, int n) { return columns[n / 2 * 4 + n % 2]; }

// Where this lane's columns begin, and those of column n on, 8 kGroups of them.
__device__ __forceinline__ SharedAddress lane_columns(const float* columns) { return shared_address(columns + threadIdx.x % 4 * 4); }
template <int kGroups>
__device__ __forceinline__ void load_columns(Initial4 (&x)[kGroups], SharedAddress its_columns, int n) {
#pragma unroll
  for (int i = 0; i < kGroups; i++) {
    const float4 y = load_shared(its_columns + (n + i * 8) * 8);
    x[i].at[0] = y.x, x[i].at[1] = y.y, x[i].at[2] = y.z, x[i].at[3] = y.w;
  }
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
