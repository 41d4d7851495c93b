// Every op of p3b_ext, one line each. Meaning: p3b_ext/reference.py. Letters: B batch, H heads, N tokens in, M tokens out, D head channels,
// C model channels. acc = float32, or float64 where the inputs are float64. Backends register themselves at the bottom of csrc/cpu/*.cpp and
// csrc/cuda/*.cu.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(p3b_ext, m) {
  // attention: q, k, v [B,H,N,D], any strides with a contiguous last axis; key_mask bool [B,N]; token_size acc [B,N]; channel_gate acc [D] or [H,D].
  // out [B,N,H,D]; lse, cls_attention, entropy acc [B,H,N]; value_norm acc [B,N]; aux: 1 cls_attention | 2 entropy | 4 value_norm, [0] where not asked for.
  m.def("masked_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? token_size, Tensor? channel_gate, float scale, int aux) -> (Tensor out, Tensor lse, Tensor cls_attention, Tensor entropy, Tensor value_norm)");
  // grad_out, out [B,N,H,D] -> grad_qkv [B,N,3,H,D], grad_token_size acc [B,N], grad_channel_gate acc as channel_gate; which: 1 grad_token_size |
  // 2 grad_channel_gate, [0] where not asked for or without sizes or gate.
  m.def("masked_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask, Tensor? token_size, Tensor? channel_gate, float scale, int which) -> (Tensor grad_qkv, Tensor grad_token_size, Tensor grad_channel_gate)");
  // second pass: to_cls, received acc [B,H,N]; which: 1 to_cls | 2 received.
  m.def("attention_columns(Tensor q, Tensor k, Tensor lse, Tensor? key_mask, Tensor? token_size, Tensor? channel_gate, float scale, int which) -> (Tensor to_cls, Tensor received)");
  // qkv [B,N,3,H,D]: as masked_attention on its three views, with a gradient that needs no copy.
  m.def("masked_attention_packed(Tensor qkv, Tensor? key_mask, Tensor? token_size, Tensor? channel_gate, float scale, int aux) -> (Tensor out, Tensor lse, Tensor cls_attention, Tensor entropy, Tensor value_norm)");

  // select: scores [B,N-num_prefix]; positions are those of x [B,N,C], prefix first; equal scores: lower index first; NaN ranks last.
  m.def("topk_tokens(Tensor scores, int keep, int num_prefix, bool by_score) -> Tensor");                  // int64 [B,num_prefix+keep]
  m.def("prune_slots(Tensor scores, int r, int num_prefix, bool by_score) -> Tensor");                     // int32 [B,N], -1 dropped
  // scores as attention acc [B,H,N] averaged over heads, times value_norm acc [B,N]; select_tokens at their topk_tokens, in one launch. CUDA only:
  // elsewhere ops/select.py calls the single ops. -> y [B,num_prefix+keep,C], index int64
  m.def("keep_tokens(Tensor x, Tensor attention, Tensor? value_norm, int keep, int num_prefix, bool by_score) -> (Tensor y, Tensor index)");
  m.def("select_tokens(Tensor x, Tensor index) -> Tensor");                                                // [B,N,C], [B,M] -> [B,M,C]
  m.def("select_tokens_backward(Tensor grad, Tensor index, int num_tokens) -> Tensor");                    // [B,M,C], [B,M] -> [B,N,C]

  // merge: slot int32 [B,N]: output row of each token, -1 dropped; source bool [B,N]: tokens that may merge into the others (None: even positions).
  m.def("match_tokens(Tensor metric, int r, int num_prefix, Tensor? source) -> Tensor");                   // [B,N,D] -> slot [B,N]; N - r rows
  // images whose scores [B,N-num_prefix] spread (variance, or that over the squared mean) by threshold (thresholds [B]) or more: prune_slots by
  // score, the others: match_tokens. CUDA only: elsewhere plan.py calls the single ops. There metric of both may be [B,H,N,D], to be averaged over heads.
  m.def("match_or_prune(Tensor metric, Tensor scores, float threshold, Tensor? thresholds, int r, int num_prefix, bool relative) -> Tensor");
  // size, weight acc [B,N]; y [B,M,C] weighted by weight, else size, else 1; size_out acc [B,M] sums size (1 where None).
  m.def("merge_tokens(Tensor x, Tensor slot, int num_out, Tensor? size, Tensor? weight, bool normalize) -> (Tensor y, Tensor size_out)");
  // -> grad_x [B,N,C], grad_size, grad_weight acc [B,N] or [0] where size / weight is None.
  m.def("merge_tokens_backward(Tensor grad_y, Tensor? grad_size_out, Tensor x, Tensor slot, Tensor y, Tensor? size, Tensor? weight, bool normalize) -> (Tensor grad_x, Tensor grad_size, Tensor grad_weight)");
  m.def("unmerge_tokens(Tensor y, Tensor slot, float fill) -> Tensor");                                    // [B,M,C], [B,N] -> [B,N,C]
  m.def("unmerge_tokens_backward(Tensor grad, Tensor slot, int num_out) -> Tensor");                       // [B,N,C], [B,N] -> [B,M,C]
}
// clang-format on
