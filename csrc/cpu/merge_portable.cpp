// RowKernels in the compiler's own vectors of 16 bytes, for any machine, and for float64 everywhere.
#include "merge_kernels_impl.h"

namespace p3b {
namespace {

using Floats = Generic<float, 4, 4>;
using Doubles = Generic<double, 2, 4>;

}  // namespace

const RowKernels kRowKernelsPortable[4] = {make_row_kernels<Floats, float, 4, 2>(), make_row_kernels<Floats, BFloat16, 4, 2>(),
                                           make_row_kernels<Floats, Half, 4, 2>(), make_row_kernels<Doubles, double, 4, 2>()};

}  // namespace p3b
