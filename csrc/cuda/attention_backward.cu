// Attention backward in float16 and bfloat16. Two kinds of jobs, a warp each: keys (grad_k, grad_v and all sums over
// queries) and queries (grad_q), 16 or 32 at a time. Both recompute the weights from lse, so that no job waits for
// another, nothing is added atomically, and results do not depend on the order of the jobs.
//   resident  Q, K, V, grad_out of a head in shared memory; its jobs are dealt to the warps of one block
//   stream    longer sequences: a block takes jobs of one kind and streams the two other tensors in chunks of 64
#include "attention.cuh"

namespace p3b::cuda {
namespace {

// Tiles of 16 rows per job. Two halve what a job reads from shared memory, which would be the bound; one of more than
// 64 channels fills the registers.
template <int kD>
constexpr int job_tiles() {
  return kD <= 64 ? 2 : 1;
}
template <int kD>
constexpr int job_rows() {
  return job_tiles<kD>() * 16;
}

// Warps of a block by registers, where one block, or two, are to fit on an SM; of more than 64 channels one is all that fits.
template <int kD>
constexpr int most_warps() {
  return kD <= 64 ? 8 : 6;
}
template <int kD>
constexpr int half_warps() {
  return kD <= 64 ? 4 : 6;
}
template <int kD>
constexpr int stream_warps() {
  return half_warps<kD>();
}

// Where one head lies.
template <class T>
struct Head {
  const BackwardArguments& a;
  unsigned index;
  int h;
  int64_t b;
  // The compiler computes it anew at each place: held over the main loops it would cost registers.
  __device__ __forceinline__ Head(const BackwardArguments& a, unsigned i)
      : a(a), index(hidden(i)), h(static_cast<int>(index % a.H)), b(index / a.H) {}
  __device__ __forceinline__ const T* at(const void* p, const Strides& s) const { return static_cast<const T*>(p) + b * s.batch + h * s.head; }
  __device__ __forceinline__ const T* q() const { return at(a.q, a.q_strides); }
  __device__ __forceinline__ const T* k() const { return at(a.k, a.k_strides); }
  __device__ __forceinline__ const T* v() const { return at(a.v, a.v_strides); }
  __device__ __forceinline__ const bool* mask() const { return mask_of(a, b); }
  __device__ __forceinline__ int64_t out_row() const { return static_cast<int64_t>(a.H) * a.columns; }
  __device__ __forceinline__ const T* out(const void* p) const { return static_cast<const T*>(p) + b * a.N * out_row() + h * a.columns; }
  __device__ __forceinline__ int64_t grad_row() const { return 3 * out_row(); }
  __device__ __forceinline__ T* grad(int which) const {  // 0 q, 1 k, 2 v
    return static_cast<T*>(a.grad_qkv) + b * a.N * grad_row() + which * out_row() + h * a.columns;
  }
  __device__ __forceinline__ int64_t rows() const { return static_cast<int64_t>(index) * a.N; }  // in [B, H, N]
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
  float dk[job_tiles<kD>()][kD / 8][4] = {}, dv[job_tiles<kD>()][kD / 8][4] = {};
};

// The rows of a job in registers: k and v, or q and grad_out; with what belongs to a row.
template <int kD>
struct JobRows {
  static constexpr int kTiles = job_tiles<kD>();
  uint32_t x[kTiles][kD / 16][4], y[kTiles][kD / 16][4];
  float shift[kTiles][2];  // keys: bias, queries: -lse, in units of log2
  float delta[kTiles][2];  // queries: -delta
};

// Where the next 16 rows of two tiles in shared memory lie, one as far behind the other as `further` says in bytes, and
// what belongs to these rows as initial values of products.
template <int kD>
struct TileRows {
  SharedAddress rows, channels;
  int further;
  SharedAddress columns;  // this lane's. Queries: -lse and, `delta` bytes behind, -delta; keys: bias
  int delta;
  // `eight`: rows are read eight at a time.
  template <class T>
  __device__ __forceinline__ TileRows(const T* x, const T* y, const float* shift, const float* delta, bool eight)
      : rows(eight ? by_eight<kD>(x, 0) : by_rows<kD>(x, 0)),
        channels(by_channels<kD>(x, 0)),
        further(static_cast<int>((y - x) * sizeof(T))),
        columns(lane_columns(shift)),
        delta(static_cast<int>((delta - shift) * sizeof(float))) {}
  __device__ __forceinline__ void advance() {
    rows += 16 * kD * 2;
    channels += 16 * kD * 2;
    columns += 16 * 8;
  }
};

// A lane's sums over its queries of the logits' gradients, for the four (or two) of the job's keys that it has. They are
// computed where token sizes need gradients, which is rare. So they are in shared memory, and sum the 16-bit values that the
// product with q takes: other calls spend neither time nor registers on them.
struct LaneSums {
  float at[4];
};

// The keys of a job against 16 queries of the tiles of q and grad_out. Logits of eight queries at a time: of 16, with all
// else that a job of keys holds, they would not fit the registers. sums: those of the block's lanes, if they are wanted.
template <class T, int kD>
__device__ __forceinline__ void key_step(KeyJob<kD>& job, const JobRows<kD>& keys, const TileRows<kD>& tiles, float scale, bool wanted,
                                         LaneSums* sums) {
  constexpr int kTiles = job_tiles<kD>(), kRow = kD * sizeof(T);
  uint32_t weights[kTiles][4], grads[kTiles][4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const SharedAddress rows = tiles.rows + half * 8 * kRow;
    float p[kTiles][1][4], ds[kTiles][1][4];
    Initial4 minus[1];
    load_columns(minus, tiles.columns, half * 8);
    rows_product<T, kD>(p, keys.x, rows, [&](int, int) { return minus[0]; });
    load_columns(minus, tiles.columns + tiles.delta, half * 8);
    rows_product<T, kD>(ds, keys.y, rows, [&](int, int) { return minus[0]; }, tiles.further);
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        p[t][0][x] = fast_exp2(fmaf(p[t][0][x], scale, keys.shift[t][x / 2]));
        ds[t][0][x] *= p[t][0][x];
      }
    pack_half<T>(weights, half, p);
    pack_half<T>(grads, half, ds);
  }
  channels_product<T, kD>(job.dv, weights, tiles.channels, tiles.further);
  channels_product<T, kD>(job.dk, grads, tiles.channels);
  if (wanted) {
    LaneSums& its = sums[hidden(threadIdx.x)];
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const float2 ds = unpack<T>(grads[t][x]);
        its.at[t * 2 + x % 2] += ds.x + ds.y;
      }
  }
}

// The queries of a job against 16 keys of the tiles of k and v.
template <class T, int kD>
__device__ __forceinline__ void query_step(float (&dq)[job_tiles<kD>()][kD / 8][4], const JobRows<kD>& queries, const TileRows<kD>& tiles,
                                           float scale) {
  constexpr int kTiles = job_tiles<kD>();
  float p[kTiles][2][4], ds[kTiles][2][4];
  Initial4 bias[2];
  load_columns(bias, tiles.columns, 0);
  rows_product<T, kD>(p, queries.x, tiles.rows, [&](int, int g) { return bias[g]; });
  auto minus_delta = [&](int t, int) { return Initial4{{queries.delta[t][0], queries.delta[t][0], queries.delta[t][1], queries.delta[t][1]}}; };
  rows_product<T, kD>(ds, queries.y, tiles.rows, minus_delta, tiles.further);
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int x = 0; x < 8; x++) ds[t][x / 4][x % 4] *= fast_exp2(fmaf(p[t][x / 4][x % 4], scale, queries.shift[t][x % 4 / 2]));
  uint32_t f[kTiles][4];
  pack_fragments<T>(f, ds);
  channels_product<T, kD>(dq, f, tiles.channels);
}

// Gates are shared by q, k and v: with W = ds^T q and U = p^T grad_out, the gradient of gate g is the sum over keys
// of 2 g scale k W + v U, which needs no division by a gate that may be 0. sums[warps][kD]: this warp adds to its row.
template <class T, int kD>
__device__ __forceinline__ void finish_keys(const BackwardArguments& a, unsigned index, KeyJob<kD>& job, int first, const LaneSums& lane_sums,
                                            const float* gate, float* sums) {
  const Head<T> head(a, index);
  const int lane = threadIdx.x % 32;
  const bool* mask = head.mask();
#pragma unroll
  for (int t = 0; t < job_tiles<kD>(); t++, first += 16) {
    if (a.size_partial) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int n = first + lane / 4 + 8 * r;
        const float sum = group_sum(lane_sums.at[t * 2 + r], 4);
        if (lane % 4 == 0 && n < a.N) a.size_partial[head.rows() + n] = sum;
      }
    }
#pragma unroll
    for (int d = 0; d < kD / 8; d++) {
      const int column = d * 8 + lane % 4 * 2;
      float(&dk)[4] = job.dk[t][d], (&dv)[4] = job.dv[t][d];
      if (sums) {
        const float g[2] = {gate[column], gate[column + 1]};
        float sum[2] = {0, 0};
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int n = first + lane / 4 + 8 * r;
          if (n >= a.N || column >= a.columns || (mask && !mask[n])) continue;
          uint32_t words[2];
          memcpy(&words[0], head.k() + n * a.k_strides.row + column, 4);
          memcpy(&words[1], head.v() + n * a.v_strides.row + column, 4);
          const float2 k = unpack<T>(words[0]), v = unpack<T>(words[1]);
          sum[0] += 2 * a.scale * g[0] * k.x * dk[2 * r] + v.x * dv[2 * r];
          sum[1] += 2 * a.scale * g[1] * k.y * dk[2 * r + 1] + v.y * dv[2 * r + 1];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          for (int x = 4; x < 32; x *= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], x);
          if (lane < 4) sums[threadIdx.x / 32 * kD + column + i] += sum[i];
        }
      }
      if (gate) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          const float g = gate[column + x % 2];
          dk[x] *= g * g;
          dv[x] *= g;
        }
      }
#pragma unroll
      for (int x = 0; x < 4; x++) dk[x] *= a.scale;
    }
    store_rows<kD>(job.dk[t], head.grad(1), head.grad_row(), first, a.N, a.columns);
    store_rows<kD>(job.dv[t], head.grad(2), head.grad_row(), first, a.N, a.columns);
  }
}

template <class T, int kD>
__device__ __forceinline__ void finish_queries(const BackwardArguments& a, unsigned index, float (&dq)[job_tiles<kD>()][kD / 8][4], int first) {
  const Head<T> head(a, index);
#pragma unroll
  for (int t = 0; t < job_tiles<kD>(); t++) {
#pragma unroll
    for (int d = 0; d < kD / 8; d++)
#pragma unroll
      for (int x = 0; x < 4; x++) dq[t][d][x] *= a.scale;
    store_rows<kD>(dq[t], head.grad(0), head.grad_row(), first + t * 16, a.N, a.columns);
  }
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
  constexpr int kTiles = job_tiles<kD>(), kRows = job_rows<kD>();
  const int rows = a.rows, lane = threadIdx.x % 32, warp = warp_number();
  const int warps = blockDim.x / 32, size = rows * kD;
  LaneSums* key_sums = reinterpret_cast<LaneSums*>(memory);  // of all lanes
  T* keys = reinterpret_cast<T*>(key_sums + blockDim.x);
  T *values = keys + size, *queries = values + size, *grads = queries + size;
  auto numbers = [&](int rows) { return reinterpret_cast<float*>(keys + rows * kD * 4); };
  float* lse = numbers(rows);                               // columns: -lse over the scale
  float *delta = lse + rows * 2, *bias = delta + rows * 2;  // columns: -delta; bias over the scale
  float* gate = a.channel_gate ? bias + rows * 2 : nullptr;
  float* sums = a.gate_partial ? bias + rows * 2 + kD : nullptr;  // [warps][kD]
  const unsigned index = blockIdx.x;
  const Head<T> head(a, index);

  load_tile<kD>(keys, head.k(), a.k_strides.row, 0, rows, a.N, a.columns, head.mask());
  load_tile<kD>(queries, head.q(), a.q_strides.row, 0, rows, a.N, a.columns);
  load_tile<kD>(values, head.v(), a.v_strides.row, 0, rows, a.N, a.columns, head.mask());
  load_tile<kD>(grads, head.out(a.grad_out), head.out_row(), 0, rows, a.N, a.columns);
  cp_async_commit();
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    store_column(bias, i, before_scale(a, key_bias(a, head.b, i)));
    store_column(lse, i, before_scale(a, -row_lse(a, a.lse, head.index, i)));
  }
  for (int i0 = warp * 4; i0 < rows; i0 += warps * 4) {
    const int i = i0 + lane / 8;
    const float d = row_delta(head.out(a.grad_out) + i * head.out_row(), head.out(a.out) + i * head.out_row(), a.columns, i < a.N);
    if (lane % 8 == 0) store_column(delta, i, -d);
  }
  if (gate) {
    load_gate(a, head.h, gate, kD);
    __syncthreads();
  }
  if (sums)
    for (int d = lane; d < kD; d += 32) sums[threadIdx.x / 32 * kD + d] = 0;
  cp_async_wait(0);
  if (gate) {
    gate_tile<kD>(keys, rows, gate, true);
    gate_tile<kD>(values, rows, gate, false);
  }
  __syncthreads();

  // Jobs are dealt in rounds, first those of keys: where these end within a round, its other warps begin with queries. Warps
  // that come first draw more: not the same ones in every block, as each belongs to a scheduler.
  auto job_of = [&](int round) { return round + static_cast<int>((warp_number() + blockIdx.x) % warps); };
#pragma unroll 1
  for (int round = 0; round < a.jobs; round += warps) {
    if (job_of(round) >= a.jobs) continue;
    const int first = job_of(round) * kRows;
    JobRows<kD> its;
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      const int row = min(first + t * 16, rows - 16);  // beyond the end anything will do: it is not stored
      tile_fragments<kD>(its.x[t], keys, row);
      tile_fragments<kD>(its.y[t], values, row);
      apply_sign<T>(a, its.x[t]);
#pragma unroll
      for (int r = 0; r < 2; r++) its.shift[t][r] = load_column(bias, row + lane / 4 + 8 * r) * a.positive.scale;
    }
    TileRows<kD> tiles(queries, grads, lse, delta, true);
    KeyJob<kD> job;
    key_sums[threadIdx.x] = {};
#pragma unroll 1
    for (int i = 0; i < rows; i += 16, tiles.advance()) key_step<T, kD>(job, its, tiles, a.positive.scale, a.size_partial, key_sums);
    finish_keys<T, kD>(a, index, job, job_of(round) * kRows, key_sums[threadIdx.x], gate, sums);
  }
#pragma unroll 1
  for (int round = a.jobs / warps * warps; round < a.jobs * 2; round += warps) {
    const int job_at = job_of(round) - a.jobs;
    if (job_at < 0 || job_at >= a.jobs) continue;
    const int first = job_at * kRows;
    JobRows<kD> its;
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      const int row = min(first + t * 16, rows - 16);
      tile_fragments<kD>(its.x[t], queries, row);
      tile_fragments<kD>(its.y[t], grads, row);
      apply_sign<T>(a, its.x[t]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int n = row + lane / 4 + 8 * r;
        its.shift[t][r] = load_column(lse, n) * a.positive.scale;
        its.delta[t][r] = load_column(delta, n);
      }
    }
    TileRows<kD> tiles(keys, values, bias, bias, false);
    float dq[kTiles][kD / 8][4] = {};
#pragma unroll 1
    for (int j = 0; j < rows; j += 16, tiles.advance()) query_step<T, kD>(dq, its, tiles, a.positive.scale);
    finish_queries<T, kD>(a, index, dq, (job_of(round) - a.jobs) * kRows);
  }
  if (sums) finish_gates(a, numbers(hidden(rows)) + 6 * hidden(rows) + kD, kD, blockIdx.x);
}

// One kind of jobs over the tensors that it streams: keys_here over Q and grad_out, else over K and V.
template <class T, int kD, bool keys_here>
__device__ __forceinline__ void stream_jobs(const BackwardArguments& a, unsigned char* memory) {
  constexpr int kTiles = job_tiles<kD>();
  const int lane = threadIdx.x % 32;
  T* ring = reinterpret_cast<T*>(memory);                                  // two stages of two tiles
  float* numbers = reinterpret_cast<float*>(ring + 4 * kChunk * kD);       // two stages of -lse and -delta, or bias: columns
  LaneSums* key_sums = reinterpret_cast<LaneSums*>(numbers + 8 * kChunk);  // of all lanes
  float* gate = a.channel_gate ? reinterpret_cast<float*>(key_sums + stream_warps<kD>() * 32) : nullptr;
  float* sums = a.gate_partial ? reinterpret_cast<float*>(key_sums + stream_warps<kD>() * 32) + kD : nullptr;
  // Computed anew at each place, as in Head: registers are short.
  auto index = [&] { return hidden(blockIdx.x) / (a.key_blocks + a.query_blocks); };
  auto block = [&] { return static_cast<int>(hidden(blockIdx.x) % (a.key_blocks + a.query_blocks)) - (keys_here ? 0 : a.key_blocks); };
  auto first_row = [&] { return (block() * stream_warps<kD>() + warp_number()) * job_rows<kD>(); };

  auto load = [&](int c) {
    if (c * kChunk < a.N) {
      const Head<T> head(a, index());
      T *one = ring + c % 2 * 2 * kChunk * kD, *two = one + kChunk * kD;
      float* number = numbers + c % 2 * 4 * kChunk;
      const bool* mask = keys_here ? nullptr : head.mask();
      load_tile<kD>(one, keys_here ? head.q() : head.k(), keys_here ? a.q_strides.row : a.k_strides.row, c * kChunk, kChunk, a.N, a.columns, mask);
      load_tile<kD>(two, keys_here ? head.out(a.grad_out) : head.v(), keys_here ? head.out_row() : a.v_strides.row, c * kChunk, kChunk, a.N,
                    a.columns, mask);
      for (int i = threadIdx.x; i < kChunk; i += blockDim.x) {
        const int n = c * kChunk + i;
        store_column(number, i, before_scale(a, keys_here ? -row_lse(a, a.lse, head.index, n) : key_bias(a, head.b, n)));
        if (keys_here) store_column(number + 2 * kChunk, i, n < a.N ? -a.delta[head.rows() + n] : 0.f);
      }
    }
    cp_async_commit();
  };
  load(0);
  load(1);
  const Head<T> head(a, index());
  if (gate) load_gate(a, head.h, gate, kD);
  if (sums)
    for (int d = lane; d < kD; d += 32) sums[threadIdx.x / 32 * kD + d] = 0;
  __syncthreads();

  const int first = first_row();
  JobRows<kD> its;
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    const bool* mask = keys_here ? head.mask() : nullptr;
    load_fragments<kD>(its.x[t], keys_here ? head.k() : head.q(), keys_here ? a.k_strides.row : a.q_strides.row, first + t * 16, a.N, a.columns,
                       mask);
    load_fragments<kD>(its.y[t], keys_here ? head.v() : head.out(a.grad_out), keys_here ? a.v_strides.row : head.out_row(), first + t * 16, a.N,
                       a.columns, mask);
    if (keys_here && gate) {
      gate_fragments<kD, T>(its.x[t], gate, true);
      gate_fragments<kD, T>(its.y[t], gate, false);
    }
    apply_sign<T>(a, its.x[t]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int n = first + t * 16 + lane / 4 + 8 * r;
      its.shift[t][r] = keys_here ? key_bias(a, head.b, n) : -row_lse(a, a.lse, head.index, n);
      its.delta[t][r] = !keys_here && n < a.N ? -a.delta[head.rows() + n] : 0.f;
    }
  }
  KeyJob<kD> job;  // grad_q is kept in job.dk
  if (keys_here) key_sums[threadIdx.x] = {};
  // One counter for chunks and the rows in them; odd where this warp's rows are beyond the end and it only helps to copy.
  unsigned n = first < a.N ? 0 : 1;
#pragma unroll 1
  while (n < static_cast<unsigned>(a.N) + n % 2) {
    const int stage = n / kChunk % 2;
    T *one = ring + stage * 2 * kChunk * kD, *two = one + kChunk * kD;
    const float* number = numbers + stage * 4 * kChunk;
    cp_async_wait(1);
    if (!keys_here && gate) {
      gate_tile<kD>(one, kChunk, gate, true);
      gate_tile<kD>(two, kChunk, gate, false);
    }
    __syncthreads();
    if (n % 2) {
      n += kChunk;
    } else {
      TileRows<kD> tiles(one, two, number, number + 2 * kChunk, keys_here);
#pragma unroll 1
      do {
        if (keys_here)
          key_step<T, kD>(job, its, tiles, a.positive.scale, a.size_partial, key_sums);
        else
          query_step<T, kD>(job.dk, its, tiles, a.positive.scale);
        n += 16;
        tiles.advance();
      } while (n < static_cast<unsigned>(a.N) && n % kChunk);
    }
    __syncthreads();
    load(n / kChunk + 1);  // n is where the next chunk begins, or beyond the last
  }
  if (n % 2 == 0) {
    if (keys_here)
      finish_keys<T, kD>(a, index(), job, first_row(), key_sums[threadIdx.x], gate, sums);
    else
      finish_queries<T, kD>(a, index(), job.dk, first_row());
  }
  if (sums && keys_here) finish_gates(a, sums, kD, static_cast<int64_t>(index()) * a.key_blocks + block());
}

template <class T, int kD>
__global__ void __launch_bounds__(stream_warps<kD>() * 32, kD <= 64 ? 2 : 1) backward_stream_kernel(BackwardArguments a) {
  P3B_SHARED(memory);
  if (static_cast<int>(blockIdx.x % (a.key_blocks + a.query_blocks)) < a.key_blocks)
    stream_jobs<T, kD, true>(a, memory);
  else
    stream_jobs<T, kD, false>(a, memory);
}

template <class T>
__global__ void __launch_bounds__(256) delta_kernel(BackwardArguments a) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 8;  // of [B, N, H]
  const bool valid = row < a.B * a.N * a.H;
  const float delta =
      row_delta(static_cast<const T*>(a.grad_out) + row * a.columns, static_cast<const T*>(a.out) + row * a.columns, a.columns, valid);
  if (valid && threadIdx.x % 8 == 0) a.delta[(row / a.H / a.N * a.H + row % a.H) * a.N + row / a.H % a.N] = delta;
}

// The launch of the resident kernel, if a head fits, with gates even where there are none: the same call with and
// without runs the same kernel.
struct ResidentLaunch {
  int warps;
  size_t bytes;
  bool fits;
};
template <int kD>
constexpr size_t sums_bytes(int warps) {  // LaneSums, a gate, and sums of its gradient
  return warps * 32 * sizeof(LaneSums) + (1 + warps) * kD * sizeof(float);
}
template <int kD>
ResidentLaunch resident_launch(int N) {
  const size_t limit = shared_memory_limit(), rows = round_up(N, 16);
  auto bytes = [&](int warps) { return rows * (4 * kD * 2 + 6 * sizeof(float)) + sums_bytes<kD>(warps); };
  // Of each block the system takes 1 KB, of the memory of an SM, which is as much more than what one block may have.
  const bool two = 2 * (bytes(half_warps<kD>()) + 1024) <= limit + 1024;
  const int most = two ? half_warps<kD>() : most_warps<kD>();
  const int warps = min(static_cast<int>(ceil_div(N, job_rows<kD>())), most);
  return {warps, bytes(warps), bytes(warps) <= limit};
}

template <int kD>
int key_blocks(int N) {
  return resident_launch<kD>(N).fits ? 1 : static_cast<int>(ceil_div(N, stream_warps<kD>() * job_rows<kD>()));
}

template <class T>
cudaError_t backward(BackwardArguments a, cudaStream_t stream) {
  a.positive = positive_scale(a.scale);
  return with_width(a.columns, [&](auto width) {
    constexpr int kD = decltype(width)::value;
    a.key_blocks = a.query_blocks = key_blocks<kD>(a.N);
    a.jobs = static_cast<int>(ceil_div(a.N, job_rows<kD>()));
    a.rows = static_cast<int>(round_up(a.N, 16));
    const ResidentLaunch resident = resident_launch<kD>(a.N);
    if (resident.fits) return launch(backward_resident_kernel<T, kD>, a.B * a.H, resident.warps * 32, resident.bytes, stream, a);
    const cudaError_t error = launch(delta_kernel<T>, ceil_div(a.B * a.N * a.H * 8, 256), 256, 0, stream, a);
    if (error != cudaSuccess) return error;
    const size_t bytes = 4 * kChunk * (kD * 2 + 2 * sizeof(float)) + sums_bytes<kD>(stream_warps<kD>());
    return launch(backward_stream_kernel<T, kD>, a.B * a.H * (a.key_blocks + a.query_blocks), stream_warps<kD>() * 32, bytes, stream, a);
  });
}

int key_blocks(int N, int columns) {
  int blocks = 0;
  with_width(columns, [&](auto width) {
    blocks = key_blocks<decltype(width)::value>(N);
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
