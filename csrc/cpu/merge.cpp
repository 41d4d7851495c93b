// merge family on the CPU: bipartite matching, merging by slot and its inverse. Meaning: p3b_ext/reference.py. Letters: csrc/merge.h.
#include "../merge.h"

#include <cmath>
#include <memory>
#include <tuple>

#include "isa.h"
#include "select_merge.h"

namespace p3b {

const RowKernels& row_kernels(RowType type) {
  const int t = static_cast<int>(type);
#if defined(__x86_64__)
  if (type != RowType::kFloat64) {
    if (isa() >= Isa::kAvx512) return kRowKernelsAvx512[t];
    if (isa() >= Isa::kAvx2) return kRowKernelsAvx2[t];
  }
#endif
  return kRowKernelsPortable[t];
}

namespace {

// ---- match_tokens

// One thread's memory for the images it matches.
template <class Acc>
struct Matcher {
  std::vector<int32_t> sources, destinations, partner;
  std::vector<Acc> best;
  std::vector<Key<Acc>> keys;
  std::vector<uint8_t> merged;
  std::unique_ptr<char[]> scratch;
  int64_t scratch_bytes = 0;

  void* scratch_of(int64_t bytes) {
    if (bytes + 64 > scratch_bytes) {
      scratch.reset(new char[bytes + 64]);
      scratch_bytes = bytes + 64;
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.get()) + 63) / 64 * 64);
  }
};

template <class T>
void match_image(const char* op, Matcher<acc_t<T>>& own, const RowKernels& kernels, const RowsIn<T>& metric, int64_t b, const Match& s,
                 const bool* source, int32_t* slot) {
  own.sources.clear();
  own.destinations.clear();
  for (int64_t n = s.num_prefix; n < s.N; n++)
    ((source ? source[b * s.N + n] : n % 2 == 0) ? own.sources : own.destinations).push_back(static_cast<int32_t>(n));
  const int64_t num_sources = own.sources.size(), num_destinations = own.destinations.size();
  P3B_CHECK(s.r <= num_sources, op, ": r must be at most the number of source tokens, ", num_sources, " in image ", b, ", got ", s.r);
  P3B_CHECK(s.r == 0 || num_destinations > 0, op, ": source must leave at least one token to merge into, got none in image ", b);

  own.best.resize(num_sources);
  own.partner.resize(num_sources);
  const int64_t bad =
      kernels.match(metric.image(b), metric.row_stride, s.D, own.sources.data(), num_sources, own.destinations.data(), num_destinations,
                    own.best.data(), own.partner.data(), own.scratch_of(kernels.match_scratch(s.D, num_sources, num_destinations)));
  P3B_CHECK(bad < 0, op, ": metric must be finite, got NaN or infinity in image ", b, ", token ", bad);
  own.keys.clear();
  for (int64_t i = 0; i < num_sources; i++) own.keys.push_back(Key<acc_t<T>>::make(own.best[i], i));
  take_best(own.keys, s.r, own.merged);

  int32_t row = 0;
  slot += b * s.N;
  for (int64_t n = 0; n < s.num_prefix; n++) slot[n] = row++;
  for (int64_t i = 0; i < num_sources; i++)
    if (!own.merged[i]) slot[own.sources[i]] = row++;
  const int32_t first_destination = row;
  for (int64_t j = 0; j < num_destinations; j++) slot[own.destinations[j]] = row++;
  for (int64_t i = 0; i < num_sources; i++)
    if (own.merged[i]) slot[own.sources[i]] = first_destination + own.partner[i];
}

Tensor match_tokens(Tensor metric, int64_t r, int64_t num_prefix, std::optional<Tensor> source) {
  const char* op = "match_tokens";
  const Match s = check_match(op, metric, r, num_prefix, source);
  Tensor slot = torch::stable::new_empty(metric, {s.B, s.N}, ScalarType::Int);
  int32_t* slot_data = static_cast<int32_t*>(slot.mutable_data_ptr());
  const ArrayIn<bool> mask(source);
  dispatch(metric, [&]<class T>() {
    const RowsIn<T> rows(metric);
    const RowKernels& kernels = row_kernels(row_type<T>());
    const int64_t products = s.N * s.N / 4 * s.D + s.N * s.D;
    parallel(s.B, (int64_t{1} << 17) / std::max<int64_t>(1, products) + 1, [&](int64_t begin, int64_t end) {
      Matcher<acc_t<T>> own;
      for (int64_t b = begin; b < end; b++) match_image(op, own, kernels, rows, b, s, mask.data, slot_data);
    });
  });
  return slot;
}

// ---- merge_tokens

void check_slot_values(const char* op, int64_t b, const int32_t* slot, int64_t N, int64_t M) {
  for (int64_t n = 0; n < N; n++)
    P3B_CHECK(slot[n] >= -1 && slot[n] < M, op, ": slot must be from -1 to ", M - 1, ", got ", slot[n], " in image ", b, ", token ", n);
}

// One image of a merge: its tokens grouped by slot, the sum of the weights w of every row, and the factor of each token in its row: w, or w / sum
// where rows are normalised and the sum is not 0.
template <class Acc>
struct ImageMerge {
  Groups groups;
  std::vector<Acc> total, factor;  // [M]; [N] in the order of groups.rows
  const Acc* weights = nullptr;    // [N]; null: all 1

  // slot [N]; size, weight [N] or null. Checks them.
  void plan(const char* op, int64_t b, const int32_t* slot, const Acc* size, const Acc* weight, bool normalize, int64_t N, int64_t M) {
    check_slot_values(op, b, slot, N, M);
    for (int64_t n = 0; size && n < N; n++)
      P3B_CHECK(size[n] > 0 && std::isfinite(size[n]), op, ": size must be positive and finite, got ", size[n], " in image ", b, ", token ", n);
    for (int64_t n = 0; weight && n < N; n++)
      P3B_CHECK(std::isfinite(weight[n]), op, ": weight must be finite, got ", weight[n], " in image ", b, ", token ", n);
    groups.fill(slot, N, M);
    weights = weight ? weight : size;
    total.resize(M);
    factor.resize(N);
    for (int64_t m = 0; m < M; m++) {
      total[m] = sum(weights, m);
      const bool divide = normalize && total[m] != 0;
      for (int64_t g = groups.first[m]; g < groups.first[m + 1]; g++) factor[g] = divide ? w(groups.rows[g]) / total[m] : w(groups.rows[g]);
    }
  }
  Acc w(int64_t n) const { return weights ? weights[n] : Acc(1); }
  Acc sum(const Acc* values, int64_t m) const {
    if (!values) return static_cast<Acc>(groups.count(m));
    Acc s = 0;
    for (const int32_t* n = groups.begin(m); n < groups.end(m); n++) s += values[*n];
    return s;
  }
};

std::tuple<Tensor, Tensor> merge_tokens(Tensor x, Tensor slot, int64_t num_out, std::optional<Tensor> size, std::optional<Tensor> weight,
                                        bool normalize) {
  const char* op = "merge_tokens";
  const Slots s = check_slots(op, "x", x, slot, num_out);
  check_size(op, "slot", slot, 1, x.size(1));
  check_weights(op, "size", size, x, s);
  check_weights(op, "weight", weight, x, s);
  Tensor y = empty_rows(x, s.B, s.M, s.C);
  Tensor size_out = torch::stable::new_empty(x, {s.B, s.M}, acc_dtype(x.scalar_type()));
  const ArrayIn<int32_t> slots(slot);
  dispatch(x, [&]<class T>() {
    using Acc = acc_t<T>;
    const RowsIn<T> in(x);
    const ArrayIn<Acc> sizes(size), weights(weight);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    Acc* totals = static_cast<Acc*>(size_out.mutable_data_ptr());
    const RowKernels& kernels = row_kernels(row_type<T>());
    parallel_images<ImageMerge<Acc>>(s.B, s.N, s.N * s.C * sizeof(T), [&](ImageMerge<Acc>& merge, int64_t b, int64_t begin, int64_t end) {
      const int32_t* target = slots.at(b, s.N);
      merge.plan(op, b, target, sizes.at(b, s.N), weights.at(b, s.N), normalize, s.N, s.M);
      if (begin == 0)
        for (int64_t m = 0; m < s.M; m++) totals[b * s.M + m] = merge.sum(sizes.at(b, s.N), m);
      sum_groups(in.image(b), in.row_stride, merge.groups, target, begin, end, merge.factor.data(), kernels, out + b * s.M * s.C, s.M, s.C);
    });
  });
  return {y, size_out};
}

// With c the factor of token n in row m, w its weight and T the sum of the row's weights:
//   dL/dx_n = c dL/dy_m        dL/dw_n = dL/dy_m . (x_n - y_m) / T where divided, else dL/dy_m . x_n
std::tuple<Tensor, Tensor, Tensor> merge_tokens_backward(Tensor grad_y, std::optional<Tensor> grad_size_out, Tensor x, Tensor slot, Tensor y,
                                                         std::optional<Tensor> size, std::optional<Tensor> weight, bool normalize) {
  const char* op = "merge_tokens_backward";
  check_dim(op, "grad_y", grad_y, 3);
  const Slots s = check_slots(op, "x", x, slot, grad_y.size(1));
  check_size(op, "slot", slot, 1, x.size(1));
  check_weights(op, "size", size, x, s);
  check_weights(op, "weight", weight, x, s);
  const Tensor* outputs[] = {&grad_y, &y};
  const char* names[] = {"grad_y", "y"};
  const int64_t sizes_of_y[] = {s.B, s.M, s.C};
  for (int i = 0; i < 2; i++) {
    check_dim(op, names[i], *outputs[i], 3);
    for (int64_t axis = 0; axis < 3; axis++) check_size(op, names[i], *outputs[i], axis, sizes_of_y[axis]);
    check_dtype(op, names[i], *outputs[i], x.scalar_type());
    check_same_device(op, names[i], *outputs[i], x);
  }
  const ScalarType acc = acc_dtype(x.scalar_type());
  if (grad_size_out) {
    check_dim(op, "grad_size_out", *grad_size_out, 2);
    check_size(op, "grad_size_out", *grad_size_out, 0, s.B);
    check_size(op, "grad_size_out", *grad_size_out, 1, s.M);
    check_dtype(op, "grad_size_out", *grad_size_out, acc);
    check_same_device(op, "grad_size_out", *grad_size_out, x);
  }
  Tensor grad_x = empty_rows(x, s.B, s.N, s.C);
  const auto per_token = [&](bool wanted) { return wanted ? torch::stable::new_empty(x, {s.B, s.N}, acc) : torch::stable::new_empty(x, {0}, acc); };
  Tensor grad_size = per_token(size.has_value()), grad_weight = per_token(weight.has_value());
  const ArrayIn<int32_t> slots(slot);
  dispatch(x, [&]<class T>() {
    using Acc = acc_t<T>;
    const ArrayIn<Acc> sizes(size), weights(weight), grad_sizes(grad_size_out);
    const RowsIn<T> xs(x), ys(y), gs(grad_y);
    const RowKernels& kernels = row_kernels(row_type<T>());
    T* gx = static_cast<T*>(grad_x.mutable_data_ptr());
    Acc* gsize = sizes.data ? static_cast<Acc*>(grad_size.mutable_data_ptr()) : nullptr;
    Acc* gweight = weights.data ? static_cast<Acc*>(grad_weight.mutable_data_ptr()) : nullptr;
    Acc* gw = gweight ? gweight : gsize;  // gradient of whichever tensor weighted the rows
    parallel_images<ImageMerge<Acc>>(s.B, s.N, s.N * s.C * sizeof(T), [&](ImageMerge<Acc>& merge, int64_t b, int64_t begin, int64_t end) {
      const int32_t* target = slots.at(b, s.N);
      const int32_t own_row = 0;
      merge.plan(op, b, target, sizes.at(b, s.N), weights.at(b, s.N), normalize, s.N, s.M);
      for (int64_t n = begin; n < end; n++) {
        const int64_t i = b * s.N + n, m = target[n];
        if (gsize) gsize[i] = m >= 0 && grad_sizes.data ? grad_sizes.data[b * s.M + m] : Acc(0);
        if (gweight) gweight[i] = 0;
        if (m < 0) {
          std::fill_n(gx + i * s.C, s.C, T(0));
          continue;
        }
        const T* g = gs.row(b, m);
        const Acc total = merge.total[m];
        const bool divide = normalize && total != 0;
        const Acc c = divide ? merge.w(n) / total : merge.w(n);
        if (c == 1)
          std::memcpy(gx + i * s.C, g, s.C * sizeof(T));
        else
          kernels.weighted_sum(gx + i * s.C, g, 0, &own_row, &c, 1, s.C);
        if (!gw || (divide && merge.groups.count(m) == 1)) continue;  // a token alone is its row, whatever its weight
        const double d = kernels.dot_difference(g, xs.row(b, n), divide ? ys.row(b, m) : nullptr, s.C);
        gw[i] += static_cast<Acc>(divide ? d / total : d);
      }
    });
  });
  return {grad_x, grad_size, grad_weight};
}

// ---- unmerge_tokens

Tensor unmerge_tokens(Tensor y, Tensor slot, double fill) {
  const char* op = "unmerge_tokens";
  const Slots s = check_slots(op, "y", y, slot, 0);
  const int64_t M = y.size(1);
  Tensor x = empty_rows(y, s.B, s.N, s.C);
  const ArrayIn<int32_t> slots(slot);
  dispatch(y, [&]<class T>() {
    const auto source = [&](int64_t b, int64_t n) {
      const int64_t m = slots.data[b * s.N + n];
      P3B_CHECK(m >= -1 && m < M, op, ": slot must be from -1 to ", M - 1, ", got ", m, " in image ", b, ", token ", n);
      return m;
    };
    gather_rows(RowsIn<T>(y), s.B, s.N, s.C, source, static_cast<T>(static_cast<acc_t<T>>(fill)), static_cast<T*>(x.mutable_data_ptr()));
  });
  return x;
}

Tensor unmerge_tokens_backward(Tensor grad, Tensor slot, int64_t num_out) {
  const char* op = "unmerge_tokens_backward";
  const Slots s = check_slots(op, "grad", grad, slot, num_out);
  check_size(op, "slot", slot, 1, grad.size(1));
  Tensor grad_y = empty_rows(grad, s.B, s.M, s.C);
  const ArrayIn<int32_t> slots(slot);
  dispatch(grad, [&]<class T>() {
    const RowsIn<T> in(grad);
    T* out = static_cast<T*>(grad_y.mutable_data_ptr());
    const RowKernels& kernels = row_kernels(row_type<T>());
    parallel_images<Groups>(s.B, s.N, s.N * s.C * sizeof(T), [&](Groups& groups, int64_t b, int64_t begin, int64_t end) {
      const int32_t* target = slots.at(b, s.N);
      check_slot_values(op, b, target, s.N, s.M);
      groups.fill(target, s.N, s.M);
      sum_groups<T>(in.image(b), in.row_stride, groups, target, begin, end, nullptr, kernels, out + b * s.M * s.C, s.M, s.C);
    });
  });
  return grad_y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CPU, m) {
  m.impl("match_tokens", TORCH_BOX(&match_tokens));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward));
  m.impl("unmerge_tokens", TORCH_BOX(&unmerge_tokens));
  m.impl("unmerge_tokens_backward", TORCH_BOX(&unmerge_tokens_backward));
}

}  // namespace p3b
