// The inner loops of merging and matching, compiled once per instruction set. Included by sources that are compiled with -mavx...: no torch header
// and no std template here, whose inline functions the linker might keep in their AVX form for everybody.
#pragma once

#include <cstdint>

namespace p3b {

enum class RowType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// For one element type T. acc is float, double for float64.
struct RowKernels {
  // y[c] = sum_i coeff[i] * x[rows[i] * stride + c], c < C, summed in the order of i in acc; coeff may be null, which stands for 1.
  void (*weighted_sum)(void* y, const void* x, int64_t stride, const int32_t* rows, const void* coeff, int64_t count, int64_t C);
  // sum_c g[c] * (x[c] - y[c]); y may be null, which stands for 0.
  double (*dot_difference)(const void* g, const void* x, const void* y, int64_t C);
  // The most similar destination of every source: x rows [N, D] of one image, stride apart; sources and destinations are lists of row numbers.
  // best[i] acc cosine similarity of source i, partner[i] a position in destinations (the lowest of the best). scratch: match_scratch() bytes,
  // aligned to 64. Returns -1, or the number of a row that is not finite.
  int64_t (*match)(const void* x, int64_t stride, int64_t D, const int32_t* sources, int64_t num_sources, const int32_t* destinations,
                   int64_t num_destinations, void* best, int32_t* partner, void* scratch);
  int64_t (*match_scratch)(int64_t D, int64_t num_sources, int64_t num_destinations);
};

extern const RowKernels kRowKernelsPortable[4];
extern const RowKernels kRowKernelsAvx2[3];
extern const RowKernels kRowKernelsAvx512[3];

// Those of the instruction set in use.
const RowKernels& row_kernels(RowType type);

}  // namespace p3b
