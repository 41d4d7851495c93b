// RowKernels for AVX2, FMA and F16C.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "merge_kernels_impl.h"
#include "simd_avx2.h"

namespace p3b {

// 12 sums, 2 columns and 1 broadcast row are 15 of the 16 registers.
const RowKernels kRowKernelsAvx2[3] = {make_row_kernels<Avx2, float, 6, 2>(), make_row_kernels<Avx2, BFloat16, 6, 2>(),
                                       make_row_kernels<Avx2, Half, 6, 2>()};

}  // namespace p3b
#endif
