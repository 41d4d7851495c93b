// Attention backward in float16 and bfloat16. Two kinds of jobs, a warp each: 16 keys (grad_k, grad_v and all sums over
// queries) and 16 queries (grad_q). Both recompute the weights from lse, so that no job waits for another, nothing is
// added atomically, and results do not depend on the order of the jobs.
//   resident  Q, K, V, grad_out of a head in shared memory; its jobs are dealt to the warps of one block
//   stream    longer sequences: a block takes 6 jobs of one kind and streams the two other tensors in chunks of 64
#include "attention.cuh"

namespace p3b::cuda {
namespace {

constexpr int kStreamWarps = 6;

template <int kD>
constexpr int most_warps() {
  return kD <= 64 ? 12 : 6;
}  // by registers: 12 x 168 or 6 x 255 a thread

// Where one head lies. Pointers are computed at each use: held over a loop they would cost registers.
template <class T>
struct Head {
  const BackwardArguments& a;
  int index, h;
  int64_t b;
  __device__ Head(const BackwardArguments& a, int index) : a(a), index(index), h(index % a.H), b(index / a.H) {}
  __device__ const T* at(const void* p, const Strides& s) const { return static_cast<const T*>(p) + b * s.batch + h * s.head; }
  __device__ const T* q() const { return at(a.q, a.q_strides); }
  __device__ const T* k() const { return at(a.k, a.k_strides); }
  __device__ const T* v() const { return at(a.v, a.v_strides); }
  __device__ int64_t out_row() const { return static_cast<int64_t>(a.H) * a.columns; }
  __device__ const T* out(const void* p) const { return static_cast<const T*>(p) + b * a.N * out_row() + h * a.columns; }
  __device__ int64_t grad_row() const { return 3 * out_row(); }
  __device__ T* grad(int which) const {  // 0 q, 1 k, 2 v
    return static_cast<T*>(a.grad_qkv) + b * a.N * grad_row() + which * out_row() + h * a.columns;
  }
  __device__ int64_t rows() const { return static_cast<int64_t>(index) * a.N; }  // in [B, H, N]
};

// grad_out . out of one row, by eight neighbouring lanes.
template <class T>
__device__ __forceinline__ float row_delta(const T* grad_out, const T* out, int columns, bool valid) {
  float sum = 0;
  for (int c = threadIdx.x % 8 * 8; c < columns && valid; c += 64) {
    const Pack16<T> x = load16(grad_out + c), y = load16(out + c);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(to_float(x.at[i]), to_float(y.at[i]), sum);
  }
  return group_sum(sum, 8);
}

template <int kD>
struct KeyJob {
  float dk[kD / 8][4] = {}, dv[kD / 8][4] = {}, sum[2] = {0, 0};  // sum over queries of the logits' gradients
};

// 16 keys against queries [i, i + 16) of the tiles.
template <class T, int kD>
__device__ __forceinline__ void key_step(KeyJob<kD>& job, const uint32_t (&k)[kD / 16][4], const uint32_t (&v)[kD / 16][4], const float (&bias)[2],
                                         const T* queries, const T* grads, const float* lse, const float* delta, int i, float scale) {
  const int lane = threadIdx.x % 32;
  float p[2][4] = {}, ds[2][4] = {};
  rows_product<kD>(p, k, queries, i);
  rows_product<kD>(ds, v, grads, i);
#pragma unroll
  for (int t = 0; t < 2; t++) {
    const int column = i + t * 8 + lane % 4 * 2;
    const float2 l = *reinterpret_cast<const float2*>(lse + column);
    const float2 d = *reinterpret_cast<const float2*>(delta + column);
#pragma unroll
    for (int x = 0; x < 4; x++) {
      p[t][x] = fast_exp2(fmaf(p[t][x], scale, bias[x / 2]) - (x % 2 ? l.y : l.x));
      ds[t][x] = p[t][x] * (ds[t][x] - (x % 2 ? d.y : d.x));
      job.sum[x / 2] += ds[t][x];
    }
  }
  uint32_t f[4];
  pack_fragment<T>(f, p);
  columns_product<kD>(job.dv, f, grads, i);
  pack_fragment<T>(f, ds);
  columns_product<kD>(job.dk, f, queries, i);
}

// 16 queries against keys [j, j + 16) of the tiles.
template <class T, int kD>
__device__ __forceinline__ void query_step(float (&dq)[kD / 8][4], const uint32_t (&q)[kD / 16][4], const uint32_t (&grad)[kD / 16][4],
                                           const float (&lse)[2], const float (&delta)[2], const T* keys, const T* values, const float* bias, int j,
                                           float scale) {
  const int lane = threadIdx.x % 32;
  float p[2][4] = {}, ds[2][4] = {};
  rows_product<kD>(p, q, keys, j);
  rows_product<kD>(ds, grad, values, j);
#pragma unroll
  for (int t = 0; t < 2; t++) {
    const float2 b = *reinterpret_cast<const float2*>(bias + j + t * 8 + lane % 4 * 2);
#pragma unroll
    for (int x = 0; x < 4; x++) ds[t][x] = fast_exp2(fmaf(p[t][x], scale, x % 2 ? b.y : b.x) - lse[x / 2]) * (ds[t][x] - delta[x / 2]);
  }
  uint32_t f[4];
  pack_fragment<T>(f, ds);
  columns_product<kD>(dq, f, keys, j);
}

// Gates are shared by q, k and v: with W = ds^T q and U = p^T grad_out, the gradient of gate g is the sum over keys
// of 2 g scale k W + v U, which needs no division by a gate that may be 0. `sums` belongs to this warp.
template <class T, int kD>
__device__ __forceinline__ void finish_keys(const BackwardArguments& a, const Head<T>& head, KeyJob<kD>& job, int first, const float* gate,
                                            float* sums) {
  const int lane = threadIdx.x % 32;
  const bool* mask = mask_of(a, head.b);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int n = first + lane / 4 + 8 * r;
    const float sum = group_sum(job.sum[r], 4);
    if (a.size_partial && lane % 4 == 0 && n < a.N) a.size_partial[head.rows() + n] = sum;
  }
#pragma unroll
  for (int d = 0; d < kD / 8; d++) {
    const int column = d * 8 + lane % 4 * 2;
    const float g[2] = {gate ? gate[column] : 1.f, gate ? gate[column + 1] : 1.f};
    if (sums) {
      float sum[2] = {0, 0};
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int n = first + lane / 4 + 8 * r;
        if (n >= a.N || column >= a.columns || (mask && !mask[n])) continue;
        uint32_t words[2];
        memcpy(&words[0], head.k() + n * a.k_strides.row + column, 4);
        memcpy(&words[1], head.v() + n * a.v_strides.row + column, 4);
        const float2 k = unpack<T>(words[0]), v = unpack<T>(words[1]);
        sum[0] += 2 * a.scale * g[0] * k.x * job.dk[d][2 * r] + v.x * job.dv[d][2 * r];
        sum[1] += 2 * a.scale * g[1] * k.y * job.dk[d][2 * r + 1] + v.y * job.dv[d][2 * r + 1];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        for (int x = 4; x < 32; x *= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], x);
        if (lane < 4) sums[column + i] += sum[i];
      }
    }
#pragma unroll
    for (int x = 0; x < 4; x++) {
      job.dk[d][x] *= a.scale * g[x % 2] * g[x % 2];
      job.dv[d][x] *= g[x % 2];
    }
  }
  store_rows<kD>(job.dk, head.grad(1), head.grad_row(), first, a.N, a.columns);
  store_rows<kD>(job.dv, head.grad(2), head.grad_row(), first, a.N, a.columns);
}

template <class T, int kD>
__device__ __forceinline__ void finish_queries(const BackwardArguments& a, const Head<T>& head, float (&dq)[kD / 8][4], int first) {
#pragma unroll
  for (int d = 0; d < kD / 8; d++)
#pragma unroll
    for (int x = 0; x < 4; x++) dq[d][x] *= a.scale;
  store_rows<kD>(dq, head.grad(0), head.grad_row(), first, a.N, a.columns);
}

// The warps' sums of gate gradients, added in the order of the warps. All threads of the block call this.
__device__ __forceinline__ void finish_gates(const BackwardArguments& a, const float* sums, int width, int64_t at) {
  __syncthreads();
  for (int d = threadIdx.x; d < a.columns; d += blockDim.x) {
    float sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) sum += sums[w * width + d];
    a.gate_partial[at * a.columns + d] = sum;
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(most_warps<kD>() * 32, 1) backward_resident_kernel(BackwardArguments a) {
  P3B_SHARED(memory);
  const int rows = static_cast<int>(round_up(a.N, 16)), lane = threadIdx.x % 32, warp = warp_number();
  const int warps = blockDim.x / 32, size = rows * kD;
  T* keys = reinterpret_cast<T*>(memory);
  T *values = keys + size, *queries = values + size, *grads = queries + size;
  float* lse = reinterpret_cast<float*>(grads + size);
  float *delta = lse + rows, *bias = delta + rows;
  float* gate = a.channel_gate ? bias + rows : nullptr;
  float* sums = a.gate_partial ? bias + rows + kD : nullptr;  // [warps][kD]
  const Head<T> head(a, blockIdx.x);

  load_tile<kD>(keys, head.k(), a.k_strides.row, 0, rows, a.N, a.columns, mask_of(a, head.b));
  load_tile<kD>(queries, head.q(), a.q_strides.row, 0, rows, a.N, a.columns);
  load_tile<kD>(values, head.v(), a.v_strides.row, 0, rows, a.N, a.columns, mask_of(a, head.b));
  load_tile<kD>(grads, head.out(a.grad_out), head.out_row(), 0, rows, a.N, a.columns);
  cp_async_commit();
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    bias[i] = key_bias(a, head.b, i);
    lse[i] = row_lse(a, a.lse, head.index, i);
  }
  for (int i0 = warp * 4; i0 < rows; i0 += warps * 4) {
    const int i = i0 + lane / 8;
    const float d = row_delta(head.out(a.grad_out) + i * head.out_row(), head.out(a.out) + i * head.out_row(), a.columns, i < a.N);
    if (lane % 8 == 0) delta[i] = d;
  }
  if (gate) {
    load_gate(a, head.h, gate, kD);
    __syncthreads();
  }
  if (sums)
    for (int d = lane; d < kD; d += 32) sums[warp * kD + d] = 0;
  cp_async_wait(0);
  if (gate) {
    gate_tile<kD>(keys, rows, gate, true);
    gate_tile<kD>(values, rows, gate, false);
  }
  __syncthreads();

  const float scale = a.scale * kLog2e;
  const int tiles = rows / 16;
#pragma unroll 1
  for (int t = warp; t < tiles; t += warps) {
    const int first = t * 16;
    uint32_t k[kD / 16][4], v[kD / 16][4];
    tile_fragments<kD>(k, keys, first);
    tile_fragments<kD>(v, values, first);
    const float its_bias[2] = {bias[first + lane / 4], bias[first + lane / 4 + 8]};
    KeyJob<kD> job;
#pragma unroll 1
    for (int i = 0; i < rows; i += 16) key_step<T, kD>(job, k, v, its_bias, queries, grads, lse, delta, i, scale);
    finish_keys<T, kD>(a, head, job, first, gate, sums ? sums + warp * kD : nullptr);
  }
  // Warps that drew fewer key jobs come first here.
#pragma unroll 1
  for (int t = (warp + warps - tiles % warps) % warps; t < tiles; t += warps) {
    const int first = t * 16;
    uint32_t q[kD / 16][4], grad[kD / 16][4];
    tile_fragments<kD>(q, queries, first);
    tile_fragments<kD>(grad, grads, first);
    const float its_lse[2] = {lse[first + lane / 4], lse[first + lane / 4 + 8]};
    const float its_delta[2] = {delta[first + lane / 4], delta[first + lane / 4 + 8]};
    float dq[kD / 8][4] = {};
#pragma unroll 1
    for (int j = 0; j < rows; j += 16) query_step<T, kD>(dq, q, grad, its_lse, its_delta, keys, values, bias, j, scale);
    finish_queries<T, kD>(a, head, dq, first);
  }
  if (sums) finish_gates(a, sums, kD, blockIdx.x);
}

// One kind of jobs over the tensors that it streams: keys_here over Q and grad_out, else over K and V.
template <class T, int kD, bool keys_here>
__device__ __forceinline__ void stream_jobs(const BackwardArguments& a, unsigned char* memory, const Head<T>& head, int block) {
  const int lane = threadIdx.x % 32, warp = warp_number(), first = (block * kStreamWarps + warp) * 16;
  T* ring = reinterpret_cast<T*>(memory);                             // two stages of two tiles
  float* numbers = reinterpret_cast<float*>(ring + 4 * kChunk * kD);  // two stages of lse and delta, or bias
  float* gate = a.channel_gate ? numbers + 4 * kChunk : nullptr;
  float* sums = a.gate_partial ? numbers + 4 * kChunk + kD : nullptr;
  const int chunks = static_cast<int>(ceil_div(a.N, kChunk));

  auto load = [&](int c) {
    if (c < chunks) {
      T *one = ring + c % 2 * 2 * kChunk * kD, *two = one + kChunk * kD;
      float* number = numbers + c % 2 * 2 * kChunk;
      const bool* mask = keys_here ? nullptr : mask_of(a, head.b);
      load_tile<kD>(one, keys_here ? head.q() : head.k(), keys_here ? a.q_strides.row : a.k_strides.row, c * kChunk, kChunk, a.N, a.columns, mask);
      load_tile<kD>(two, keys_here ? head.out(a.grad_out) : head.v(), keys_here ? head.out_row() : a.v_strides.row, c * kChunk, kChunk, a.N,
                    a.columns, mask);
      for (int i = threadIdx.x; i < kChunk; i += blockDim.x) {
        const int n = c * kChunk + i;
        number[i] = keys_here ? row_lse(a, a.lse, head.index, n) : key_bias(a, head.b, n);
        if (keys_here) number[kChunk + i] = n < a.N ? a.delta[head.rows() + n] : 0.f;
      }
    }
    cp_async_commit();
  };
  load(0);
  load(1);
  if (gate) load_gate(a, head.h, gate, kD);
  if (sums)
    for (int d = lane; d < kD; d += 32) sums[warp * kD + d] = 0;
  __syncthreads();

  const float scale = a.scale * kLog2e;
  uint32_t x[kD / 16][4], y[kD / 16][4];  // k and v, or q and grad_out
  float row[2][2];                        // bias, or lse and delta
  const bool* mask = keys_here ? mask_of(a, head.b) : nullptr;
  load_fragments<kD>(x, keys_here ? head.k() : head.q(), keys_here ? a.k_strides.row : a.q_strides.row, first, a.N, a.columns, mask);
  load_fragments<kD>(y, keys_here ? head.v() : head.out(a.grad_out), keys_here ? a.v_strides.row : head.out_row(), first, a.N, a.columns, mask);
  if (keys_here && gate) {
    gate_fragments<kD, T>(x, gate, true);
    gate_fragments<kD, T>(y, gate, false);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int n = first + lane / 4 + 8 * r;
    row[0][r] = keys_here ? key_bias(a, head.b, n) : row_lse(a, a.lse, head.index, n);
    row[1][r] = !keys_here && n < a.N ? a.delta[head.rows() + n] : 0.f;
  }
  KeyJob<kD> job;  // grad_q is kept in job.dk
#pragma unroll 1
  for (int c = 0; c < chunks; c++) {
    T *one = ring + c % 2 * 2 * kChunk * kD, *two = one + kChunk * kD;
    const float* number = numbers + c % 2 * 2 * kChunk;
    cp_async_wait(1);
    if (!keys_here && gate) {
      gate_tile<kD>(one, kChunk, gate, true);
      gate_tile<kD>(two, kChunk, gate, false);
    }
    __syncthreads();
    if (first < a.N) {
      const int rows = min(kChunk, static_cast<int>(round_up(a.N - c * kChunk, 16)));
      if (keys_here) {
#pragma unroll 1
        for (int i = 0; i < rows; i += 16) key_step<T, kD>(job, x, y, row[0], one, two, number, number + kChunk, i, scale);
      } else {
#pragma unroll 1
        for (int j = 0; j < rows; j += 16) query_step<T, kD>(job.dk, x, y, row[0], row[1], one, two, number, j, scale);
      }
    }
    __syncthreads();
    load(c + 2);
  }
  if (first < a.N) {
    if (keys_here)
      finish_keys<T, kD>(a, head, job, first, gate, sums ? sums + warp * kD : nullptr);
    else
      finish_queries<T, kD>(a, head, job.dk, first);
  }
  if (sums && keys_here) finish_gates(a, sums, kD, static_cast<int64_t>(head.index) * a.key_blocks + block);
}

template <class T, int kD>
__global__ void __launch_bounds__(kStreamWarps * 32, kD <= 64 ? 2 : 1) backward_stream_kernel(BackwardArguments a) {
  P3B_SHARED(memory);
  const int blocks = a.key_blocks + a.query_blocks, block = blockIdx.x % blocks;
  const Head<T> head(a, blockIdx.x / blocks);
  if (block < a.key_blocks)
    stream_jobs<T, kD, true>(a, memory, head, block);
  else
    stream_jobs<T, kD, false>(a, memory, head, block - a.key_blocks);
}

template <class T>
__global__ void __launch_bounds__(256) delta_kernel(BackwardArguments a) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 8;  // of [B, N, H]
  const bool valid = row < a.B * a.N * a.H;
  const float delta =
      row_delta(static_cast<const T*>(a.grad_out) + row * a.columns, static_cast<const T*>(a.out) + row * a.columns, a.columns, valid);
  if (valid && threadIdx.x % 8 == 0) a.delta[(row / a.H / a.N * a.H + row % a.H) * a.N + row / a.H % a.N] = delta;
}

template <int kD>
size_t resident_bytes(int N, int warps) {  // with gates, so that the same call with and without runs the same kernel
  const size_t rows = round_up(N, 16);
  return rows * (4 * kD * 2 + 3 * sizeof(float)) + (1 + warps) * kD * sizeof(float);
}

template <class T>
cudaError_t backward(BackwardArguments a, cudaStream_t stream) {
  a.key_blocks = attention_key_blocks<T>(a.N, a.columns);
  a.query_blocks = a.key_blocks;
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    const size_t limit = shared_memory_limit();
    const int tiles = static_cast<int>(ceil_div(a.N, 16));
    const int most = resident_bytes<kD>(a.N, 6) <= limit / 2 ? 6 : most_warps<kD>();  // 6: two blocks fit an SM
    if (resident_bytes<kD>(a.N, most) <= limit)
      return launch(backward_resident_kernel<T, kD>, a.B * a.H, min(tiles, most) * 32, resident_bytes<kD>(a.N, min(tiles, most)), stream, a);
    const cudaError_t error = launch(delta_kernel<T>, ceil_div(a.B * a.N * a.H * 8, 256), 256, 0, stream, a);
    if (error != cudaSuccess) return error;
    const size_t bytes = 4 * kChunk * (kD * 2 + sizeof(float)) + (1 + kStreamWarps) * kD * sizeof(float);
    return launch(backward_stream_kernel<T, kD>, a.B * a.H * (a.key_blocks + a.query_blocks), kStreamWarps * 32, bytes, stream, a);
  });
}

int key_blocks(int N, int columns) {
  int blocks = 0;
  with_width(columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    const size_t limit = shared_memory_limit();
    const int most = resident_bytes<kD>(N, 6) <= limit / 2 ? 6 : most_warps<kD>();
    blocks = resident_bytes<kD>(N, most) <= limit ? 1 : static_cast<int>(ceil_div(N, 16 * kStreamWarps));
    return cudaSuccess;
  });
  return blocks;
}

__global__ void size_grad_kernel(BackwardArguments a, float* grad_size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.B * a.N) return;
  const float* from = a.size_partial + i / a.N * a.H * a.N + i % a.N;
  float sum = 0;
  for (int h = 0; h < a.H; h++) sum += from[static_cast<int64_t>(h) * a.N];
  grad_size[i] = sum / a.token_size[i];
}

// A block adds 32 channels of one gate (of one head, where gates are per head): 32 partial sums, then their sum.
__global__ void __launch_bounds__(1024) gate_grad_kernel(BackwardArguments a, float* grad_gate, int per_head) {
  P3B_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);  // [32][32]
  const int tiles = static_cast<int>(ceil_div(a.D, 32)), h = blockIdx.x / tiles;
  const int d = blockIdx.x % tiles * 32 + threadIdx.x % 32, group = threadIdx.x / 32;
  const int parts = per_head ? a.key_blocks : a.H * a.key_blocks, rows = static_cast<int>(a.B) * parts;
  const int64_t image = static_cast<int64_t>(a.H) * a.key_blocks * a.columns;
  float sum = 0;
  if (d < a.D) {
    const float* from = a.gate_partial + (per_head ? static_cast<int64_t>(h) * a.key_blocks * a.columns : 0) + d;
#pragma unroll 4
    for (int r = group; r < rows; r += 32) sum += from[r / parts * image + r % parts * a.columns];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && d < a.D) {
    float total = 0;
    for (int g = 0; g < 32; g++) total += sums[g * 32 + threadIdx.x];
    grad_gate[static_cast<int64_t>(h) * a.D + d] = total;
  }
}

}  // namespace

template <>
int attention_key_blocks<__half>(int N, int columns) {
  return key_blocks(N, columns);
}
template <>
int attention_key_blocks<__nv_bfloat16>(int N, int columns) {
  return key_blocks(N, columns);
}
template <>
cudaError_t attention_backward<__half>(BackwardArguments a, cudaStream_t stream) {
  return backward<__half>(a, stream);
}
template <>
cudaError_t attention_backward<__nv_bfloat16>(BackwardArguments a, cudaStream_t stream) {
  return backward<__nv_bfloat16>(a, stream);
}

cudaError_t attention_size_grad(const BackwardArguments& a, float* grad_size, cudaStream_t stream) {
  return launch(size_grad_kernel, ceil_div(a.B * a.N, 256), 256, 0, stream, a, grad_size);
}

cudaError_t attention_gate_grad(const BackwardArguments& a, float* grad_gate, cudaStream_t stream) {
  const int per_head = a.gate_head != 0;
  return launch(gate_grad_kernel, (per_head ? a.H : 1) * ceil_div(a.D, 32), 1024, 4096, stream, a, grad_gate, per_head);
}

}  // namespace p3b::cuda
