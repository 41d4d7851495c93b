// Shapes and input checks of the select family, shared by CPU and CUDA. Letters: B batch, S scored tokens, N = S + num_prefix tokens, C channels.
#pragma once

#include "checks.h"

namespace p3b {

struct Scores {
  int64_t B, S, num_prefix;
};

// count: tokens to keep or to drop, 0 to S; name: that argument's name in the error.
inline Scores check_scores(const char* op, const Tensor& scores, const char* name, int64_t count, int64_t num_prefix) {
  check_dim(op, "scores", scores, 2);
  check_floating(op, "scores", scores);
  P3B_CHECK(num_prefix >= 0, op, ": num_prefix must be at least 0, got ", num_prefix);
  Scores s{scores.size(0), scores.size(1), num_prefix};
  P3B_CHECK(count >= 0 && count <= s.S, op, ": ", name, " must be between 0 and ", s.S, ", got ", count);
  return s;
}

struct Keep {
  int64_t B, N, C, H;
};

// x [B,N,C], attention acc [B,H,N], value_norm acc [B,N] (acc: csrc/library.cpp)
inline Keep check_keep(const char* op, const Tensor& x, const Tensor& attention, const std::optional<Tensor>& value_norm, int64_t keep,
                       int64_t num_prefix) {
  check_dim(op, "x", x, 3);
  check_floating(op, "x", x);
  check_dim(op, "attention", attention, 3);
  check_dtype(op, "attention", attention, acc_dtype(x.scalar_type()));
  const Keep s{x.size(0), x.size(1), x.size(2), attention.size(1)};
  check_size(op, "attention", attention, 0, s.B);
  check_size(op, "attention", attention, 2, s.N);
  check_same_device(op, "attention", attention, x);
  P3B_CHECK(s.H > 0, op, ": attention must have at least one head, got shape ", shape(attention));
  if (value_norm) {
    check_dim(op, "value_norm", *value_norm, 2);
    check_dtype(op, "value_norm", *value_norm, acc_dtype(x.scalar_type()));
    check_size(op, "value_norm", *value_norm, 0, s.B);
    check_size(op, "value_norm", *value_norm, 1, s.N);
    check_same_device(op, "value_norm", *value_norm, x);
  }
  P3B_CHECK(num_prefix >= 0 && num_prefix <= s.N, op, ": num_prefix must be between 0 and ", s.N, ", got ", num_prefix);
  P3B_CHECK(keep >= 0 && keep <= s.N - num_prefix, op, ": keep must be between 0 and ", s.N - num_prefix, ", got ", keep);
  return s;
}

struct Rows {
  int64_t B, N, M, C;
};

inline Rows check_select(const char* op, const Tensor& x, const Tensor& index, const char* name = "x") {
  check_dim(op, name, x, 3);
  check_floating(op, name, x);
  check_dim(op, "index", index, 2);
  check_dtype(op, "index", index, ScalarType::Long);
  check_size(op, "index", index, 0, x.size(0));
  check_same_device(op, "index", index, x);
  return {x.size(0), x.size(1), index.size(1), x.size(2)};
}

}  // namespace p3b
