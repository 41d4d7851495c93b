// Shapes and input checks of the merge family, shared by CPU and CUDA. Letters: B batch, N tokens in, M tokens out, C channels.
#pragma once

#include "checks.h"

namespace p3b {

struct Match {
  int64_t B, N, D, num_prefix, r;
};

// metric [B,N,D], or with `heads` also [B,H,N,D]
inline Match check_match(const char* op, const Tensor& metric, int64_t r, int64_t num_prefix, const std::optional<Tensor>& source,
                         bool heads = false) {
  const int64_t dim = heads && metric.dim() == 4 ? 4 : 3;
  check_dim(op, "metric", metric, dim);
  check_floating(op, "metric", metric);
  P3B_CHECK(dim == 3 || metric.size(1) > 0, op, ": metric must have at least one head, got shape ", shape(metric));
  Match s{metric.size(0), metric.size(dim - 2), metric.size(dim - 1), num_prefix, r};
  P3B_CHECK(num_prefix >= 0 && num_prefix <= s.N, op, ": num_prefix must be between 0 and ", s.N, ", got ", num_prefix);
  if (source) {
    check_dtype(op, "source", *source, ScalarType::Bool);
    check_dim(op, "source", *source, 2);
    check_size(op, "source", *source, 0, s.B);
    check_size(op, "source", *source, 1, s.N);
    check_same_device(op, "source", *source, metric);
    P3B_CHECK(r >= 0 && r <= s.N, op, ": r must be between 0 and ", s.N, ", got ", r);
  } else {
    P3B_CHECK(r >= 0 && r <= (s.N - num_prefix) / 2, op, ": r must be between 0 and ", (s.N - num_prefix) / 2, ", got ", r);
  }
  return s;
}

struct Slots {
  int64_t B, N, M, C;
};

// x [B,N,C] and slot [B,N] on the side of the tokens.
inline Slots check_slots(const char* op, const char* name, const Tensor& x, const Tensor& slot, int64_t num_out) {
  check_dim(op, name, x, 3);
  check_floating(op, name, x);
  check_dim(op, "slot", slot, 2);
  check_dtype(op, "slot", slot, ScalarType::Int);
  check_size(op, "slot", slot, 0, x.size(0));
  check_same_device(op, "slot", slot, x);
  P3B_CHECK(num_out >= 0, op, ": num_out must be at least 0, got ", num_out);
  return {x.size(0), slot.size(1), num_out, x.size(2)};
}

// size or weight: acc [B,N]
inline void check_weights(const char* op, const char* name, const std::optional<Tensor>& w, const Tensor& x, const Slots& s) {
  if (!w) return;
  check_dtype(op, name, *w, acc_dtype(x.scalar_type()));
  check_dim(op, name, *w, 2);
  check_size(op, name, *w, 0, s.B);
  check_size(op, name, *w, 1, s.N);
  check_same_device(op, name, *w, x);
}

}  // namespace p3b
