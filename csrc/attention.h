// Shapes and input checks of the attention family, shared by CPU and CUDA. Letters: B batch, H heads, N tokens, D head channels.
#pragma once

#include "checks.h"

namespace p3b {

// Bits of `aux` and `which`, as in p3b_ext/reference.py.
enum Aux : int64_t { kClsAttention = 1, kEntropy = 2, kValueNorm = 4 };
enum Columns : int64_t { kToCls = 1, kReceived = 2 };
enum Gradients : int64_t { kTokenSize = 1, kChannelGate = 2 };

struct Attention {
  int64_t B, H, N, D;
  bool gate_per_head;  // channel_gate is [H, D] rather than [D]
  double scale;
};

// What packed and separate q, k, v have in common; `first` is the tensor that s was read from.
inline void check_options(const char* op, Attention& s, const char* name, const Tensor& first, const std::optional<Tensor>& key_mask,
                          const std::optional<Tensor>& token_size, const std::optional<Tensor>& channel_gate) {
  P3B_CHECK(s.N > 0 && s.D > 0 && s.H > 0, op, ": ", name, " must have at least one head, one token and one channel, got shape ", shape(first));
  if (key_mask) {
    check_dtype(op, "key_mask", *key_mask, ScalarType::Bool);
    check_dim(op, "key_mask", *key_mask, 2);
    check_size(op, "key_mask", *key_mask, 0, s.B);
    check_size(op, "key_mask", *key_mask, 1, s.N);
    check_same_device(op, "key_mask", *key_mask, first);
  }
  if (token_size) {
    check_dtype(op, "token_size", *token_size, acc_dtype(first.scalar_type()));
    check_dim(op, "token_size", *token_size, 2);
    check_size(op, "token_size", *token_size, 0, s.B);
    check_size(op, "token_size", *token_size, 1, s.N);
    check_same_device(op, "token_size", *token_size, first);
  }
  if (channel_gate) {
    const Tensor& g = *channel_gate;
    check_dtype(op, "channel_gate", g, acc_dtype(first.scalar_type()));
    P3B_CHECK(g.dim() == 1 || g.dim() == 2, op, ": channel_gate must be [D] or [H, D], got shape ", shape(g));
    s.gate_per_head = g.dim() == 2;
    if (s.gate_per_head) check_size(op, "channel_gate", g, 0, s.H);
    check_size(op, "channel_gate", g, g.dim() - 1, s.D);
    check_same_device(op, "channel_gate", g, first);
  }
}

inline Attention check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor* v, const std::optional<Tensor>& key_mask,
                                 const std::optional<Tensor>& token_size, const std::optional<Tensor>& channel_gate, double scale) {
  check_dim(op, "q", q, 4);
  Attention s{q.size(0), q.size(1), q.size(2), q.size(3), false, scale};
  check_floating(op, "q", q);
  const Tensor* rest[] = {&q, &k, v};
  const char* names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; i++) {
    if (!rest[i]) continue;
    const Tensor& t = *rest[i];
    check_dim(op, names[i], t, 4);
    for (int64_t axis = 0; axis < 4; axis++) check_size(op, names[i], t, axis, q.size(axis));
    check_dtype(op, names[i], t, q.scalar_type());
    check_same_device(op, names[i], t, q);
    check_rows(op, names[i], t);
  }
  check_options(op, s, "q", q, key_mask, token_size, channel_gate);
  return s;
}

// qkv [B, N, 3, H, D], read in place as three [B, H, N, D].
inline Attention check_packed(const char* op, const Tensor& qkv, const std::optional<Tensor>& key_mask, const std::optional<Tensor>& token_size,
                              const std::optional<Tensor>& channel_gate, double scale) {
  check_dim(op, "qkv", qkv, 5);
  check_size(op, "qkv", qkv, 2, 3);
  check_floating(op, "qkv", qkv);
  check_rows(op, "qkv", qkv);
  Attention s{qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(4), false, scale};
  check_options(op, s, "qkv", qkv, key_mask, token_size, channel_gate);
  return s;
}

inline void check_attention_grad(const char* op, const Attention& s, const Tensor& q, const Tensor& grad_out, const Tensor& out, const Tensor& lse) {
  const Tensor* both[] = {&grad_out, &out};
  const char* names[] = {"grad_out", "out"};
  const int64_t sizes[] = {s.B, s.N, s.H, s.D};
  for (int i = 0; i < 2; i++) {
    check_dim(op, names[i], *both[i], 4);
    for (int64_t axis = 0; axis < 4; axis++) check_size(op, names[i], *both[i], axis, sizes[axis]);
    check_dtype(op, names[i], *both[i], q.scalar_type());
    check_same_device(op, names[i], *both[i], q);
  }
  P3B_CHECK(lse.dim() == 3 && lse.size(0) == s.B && lse.size(1) == s.H && lse.size(2) == s.N, op, ": lse must be [B, H, N], got shape ", shape(lse));
  check_dtype(op, "lse", lse, acc_dtype(q.scalar_type()));
  check_same_device(op, "lse", lse, q);
}

}  // namespace p3b
