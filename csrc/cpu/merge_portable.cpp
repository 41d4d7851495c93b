// RowKernels in the compiler's own vectors of 16 bytes, for any machine, and for float64 everywhere.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>

#include "merge_kernels.h"

namespace p3b {
namespace {

template <class Scalar, class Integer>
struct Vec16 {
  using Acc = Scalar;
  static constexpr int kWidth = 16 / sizeof(Acc), kRows = 4, kColumns = 2;
  static constexpr Acc kMax = std::numeric_limits<Acc>::max(), kInfinity = std::numeric_limits<Acc>::infinity(),
                       kShrink = sizeof(Acc) == 4 ? Acc(0x1p-80) : Acc(0x1p-600);
  typedef Acc Lanes __attribute__((vector_size(16)));
  typedef Integer Index __attribute__((vector_size(16)));

  Lanes v;

  static Vec16 zero() { return {Lanes{}}; }
  static Vec16 broadcast(Acc x) { return {Lanes{} + x}; }
  static Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {a.v * b.v + c.v}; }
  static Vec16 divide(Vec16 a, Vec16 b) { return {a.v / b.v}; }
  template <class T>
  static Vec16 load(const T* p) {
    Vec16 r;
    for (int i = 0; i < kWidth; i++) r.v[i] = static_cast<Acc>(p[i]);
    return r;
  }
  template <class T>
  static void store(T* p, Vec16 a) {
    for (int i = 0; i < kWidth; i++) p[i] = static_cast<T>(a.v[i]);
  }
  static Acc sum(Vec16 a) {
    Acc s = 0;
    for (int i = 0; i < kWidth; i++) s += a.v[i];
    return s;
  }
  static Index count_from(int64_t start) {
    Index r;
    for (int i = 0; i < kWidth; i++) r[i] = static_cast<Integer>(start + i);
    return r;
  }
  static Index below(Index index, int64_t n) { return index < static_cast<Integer>(n); }
  static void keep_greater(Vec16 score, Index index, Index valid, Vec16& best, Index& at) {
    const Index greater = (score.v > best.v) & valid;
    best.v = greater ? score.v : best.v;
    at = greater ? index : at;
  }
  static void store_index(int32_t* p, Index index) {
    for (int i = 0; i < kWidth; i++) p[i] = static_cast<int32_t>(index[i]);
  }
  static void transpose(const Acc* in, int64_t in_stride, Acc* out) {
    for (int i = 0; i < kWidth; i++)
      for (int j = 0; j < kWidth; j++) out[j * kWidth + i] = in[i * in_stride + j];
  }
};

using F32x4 = Vec16<float, int32_t>;
using F64x2 = Vec16<double, int64_t>;

#include "merge_kernels_impl.h"

}  // namespace

const RowKernels kRowKernelsPortable[4] = {
    make_row_kernels<F32x4, float>(),
    make_row_kernels<F32x4, torch::headeronly::BFloat16>(),
    make_row_kernels<F32x4, torch::headeronly::Half>(),
    make_row_kernels<F64x2, double>(),
};

}  // namespace p3b
