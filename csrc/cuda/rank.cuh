// Ranking the scores of one image in shared memory, for the select and merge families. All of it is counting: results
// are exact, equal scores go by position, and no N x N comparison is needed to keep the order of positions.
#pragma once

#include "rows.cuh"

namespace p3b::cuda {

// A key that orders as the scores do: equal scores (0 and -0 too) equal keys, NaN below everything.
__device__ __forceinline__ uint32_t score_key(float score) {
  if (score != score) return 0;
  const float x = score == 0 ? 0.f : score;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `keep` best of S keys: all above `key`, and the first `ties` of those equal to it.
struct Cut {
  uint32_t key;
  int ties;
};

// Finds the cut bit by bit from the top; stops where a bound splits the keys as wanted. `counts` holds two rows of one
// number per warp, so that one barrier a bit is enough. All threads of the block call this.
__device__ __forceinline__ Cut find_cut(const uint32_t* keys, int S, int keep, int* counts) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Cut cut{0, keep};
  for (int bit = 31; bit >= 0; bit--) {
    const uint32_t bound = cut.key | 1u << bit;
    int count = 0;
    for (int i = threadIdx.x; i < S; i += blockDim.x) count += keys[i] >= bound;
    count = group_sum(count, 32);
    int* row = counts + bit % 2 * warps;
    if (threadIdx.x % 32 == 0) row[warp] = count;
    __syncthreads();
    count = 0;
    for (int w = 0; w < warps; w++) count += row[w];
    if (count >= keep)
      cut.key = bound;
    else
      cut.ties = keep - count;  // the last bound with too few is the number after the cut, or splits off a part of it
    if (count == keep) break;
  }
  return cut;
}

// Rows of tokens first + r among the kept ones in the order of positions, -1 for those that go. One warp.
__device__ __forceinline__ void rows_by_position(int (&row)[kRowsInFlight], const uint32_t* keys, int S, Cut cut, int first) {
  const int lane = threadIdx.x % 32, last = min(first + kRowsInFlight, S) - 1;
#pragma unroll
  for (int r = 0; r < kRowsInFlight; r++) row[r] = -1;
  int before = 0;
  for (int i0 = 0; i0 <= last; i0 += 32) {
    const int i = i0 + lane;
    const uint32_t key = i < S ? keys[i] : 0;
    const unsigned equal = __ballot_sync(kAllLanes, i < S && key == cut.key), lower = (1u << lane) - 1;
    const bool taken = i < S && (key > cut.key || (key == cut.key && __popc(equal & lower) < cut.ties));
    const unsigned kept = __ballot_sync(kAllLanes, taken);
    cut.ties -= min(cut.ties, __popc(equal));
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      const int bit = first + r - i0;
      if (bit >= 0 && bit < 32 && kept >> bit & 1) row[r] = before + __popc(kept & ((1u << bit) - 1));
    }
    before += __popc(kept);
  }
}

// Ranks of tokens first + r: how many come before each; -1 from `keep` on. One warp.
__device__ __forceinline__ void rows_by_score(int (&row)[kRowsInFlight], const uint32_t* keys, int S, int keep, int first) {
  uint32_t own[kRowsInFlight];
  int before[kRowsInFlight] = {};
#pragma unroll
  for (int r = 0; r < kRowsInFlight; r++) own[r] = first + r >= 0 && first + r < S ? keys[first + r] : 0;
  for (int j = threadIdx.x % 32; j < S; j += 32) {
    const uint32_t other = keys[j];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) before[r] += other > own[r] || (other == own[r] && j < first + r);
  }
#pragma unroll
  for (int r = 0; r < kRowsInFlight; r++) {
    const int rank = group_sum(before[r], 32);
    row[r] = first + r >= 0 && first + r < S && rank < keep ? rank : -1;
  }
}

}  // namespace p3b::cuda
