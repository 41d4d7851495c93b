// Ranking by score and gathering rows: kernel -> launch -> op.
#include "rows.cuh"

namespace p3b {
namespace {

constexpr int kRankThreads = 256;

// A key that orders as the scores do: equal scores (0 and -0 too) equal keys, NaN below everything.
__device__ __forceinline__ uint32_t score_key(float score) {
  if (score != score) return 0;
  const float x = score == 0 ? 0.f : score;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One block per image: the rank of a token is the number of tokens before it, counted in shared memory.
// index [B, P + keep] takes the positions that stay; slot [B, P + S] the row of every token, -1 where it goes.
template <class T>
__global__ void __launch_bounds__(kRankThreads)
    rank_kernel(const T* scores, int64_t stride, int S, int P, int keep, bool by_score, int64_t* index, int* slot) {
  P3B_SHARED(memory);
  uint32_t* key = reinterpret_cast<uint32_t*>(memory);
  uint32_t* kept = key + S;  // one bit per token
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < S; i += blockDim.x) key[i] = score_key(to_float(scores[b * stride + i]));
  __syncthreads();

  auto put = [&](int i, int row) {  // token i of the scores goes to row `row` behind the prefix, or nowhere
    if (index && row >= 0) index[b * (P + keep) + P + row] = P + i;
    if (slot) slot[b * (P + S) + P + i] = row < 0 ? -1 : P + row;
  };
  for (int i0 = 0; i0 < S; i0 += blockDim.x) {
    const int i = i0 + threadIdx.x;
    int rank = S;
    if (i < S) {
      const uint32_t mine = key[i];
      rank = 0;
      for (int j = 0; j < i; j++) rank += key[j] >= mine;
      for (int j = i + 1; j < S; j++) rank += key[j] > mine;
    }
    if (by_score && i < S) put(i, rank < keep ? rank : -1);
    const unsigned bits = __ballot_sync(kAllLanes, rank < keep);
    if (lane == 0 && i < S) kept[i / 32] = bits;
  }
  __syncthreads();
  if (!by_score) {
    for (int i = threadIdx.x; i < S; i += blockDim.x) {
      int row = __popc(kept[i / 32] & ((1u << i % 32) - 1));
      for (int w = 0; w < i / 32; w++) row += __popc(kept[w]);
      put(i, kept[i / 32] >> i % 32 & 1 ? row : -1);
    }
  }
  for (int i = threadIdx.x; i < P; i += blockDim.x) {
    if (index) index[b * (P + keep) + i] = i;
    if (slot) slot[b * (P + S) + i] = i;
  }
}

}  // namespace

template <class T>
cudaError_t rank_tokens(const T* scores, int64_t stride, int64_t B, int S, int P, int keep, bool by_score,
                        int64_t* index, int* slot, cudaStream_t stream) {
  return launch(rank_kernel<T>, B, kRankThreads, (S + ceil_div(S, 32)) * 4, stream, scores, stride, S, P, keep,
                by_score, index, slot);
}

}  // namespace p3b
