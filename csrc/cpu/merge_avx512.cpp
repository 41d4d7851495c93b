// RowKernels for AVX-512 (F, BW, VL, DQ).
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "merge_kernels_impl.h"
#include "simd_avx512.h"

namespace p3b {

// 24 sums, 4 columns and 1 broadcast row of 32 registers; 98 destinations are 7 vectors, one tile of 4 and one of 3.
const RowKernels kRowKernelsAvx512[3] = {make_row_kernels<Avx512, float, 6, 4>(), make_row_kernels<Avx512, BFloat16, 6, 4>(),
                                         make_row_kernels<Avx512, Half, 6, 4>()};

}  // namespace p3b
#endif
