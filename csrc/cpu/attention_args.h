// The interface between attention.cpp (torch, threads, allocation) and the kernels (no torch, one translation unit per instruction set).
// Plain data only: an inline function here would be compiled for AVX-512 in one unit and could be linked into all of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace p3b {

enum class Storage : int { kFloat = 0, kBFloat16 = 1, kHalf = 2, kDouble = 3 };

// A [B, H, N, D] tensor of the storage type with a contiguous last axis; strides in elements.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

// One call of an op. "acc" is float, or double beside double. Task t of a call is chunk t % chunks of the query rows of head t / chunks.
struct AttentionArgs {
  int64_t B, H, N, D;
  int64_t chunks;
  double scale;

  Heads q, k, v;
  const uint8_t* key_mask;  // [B, N] by strides, or null
  int64_t mask_batch, mask_token;
  const void* bias;  // acc [B, N]: log2(token_size), or null
  const void* gate;  // acc [H or 1, gate_row], zero beyond D, or null
  int64_t gate_head, gate_row;

  // masked_attention; side outputs acc [B, H, N], null where not asked for.
  Heads out;
  void *lse, *cls_attention, *entropy, *value_square;

  // masked_attention_backward (which needs neither out nor lse)
  Heads grad_out, grad_q, grad_k, grad_v;
  void* grad_kv_partial;    // acc [tasks, 2, N, gate_row]; null where chunks == 1
  void* grad_gate_partial;  // acc [B * H, chunks + 1, gate_row], or null
  void* grad_size_partial;  // acc [tasks, N], or null

  // attention_columns
  const void* saved_lse;   // acc [B, H, N]
  void* to_cls;            // acc [B, H, N], or null
  void* received_partial;  // acc [tasks, N], or null
};

struct AttentionKernels {
  size_t (*forward_scratch)(const AttentionArgs&);
  void (*forward)(const AttentionArgs&, int64_t task, void* scratch);
  size_t (*backward_scratch)(const AttentionArgs&);
  void (*backward)(const AttentionArgs&, int64_t task, void* scratch);         // with one chunk it writes grad_k and grad_v too
  void (*backward_finish)(const AttentionArgs&, int64_t head, void* scratch);  // sums the chunks of a head into grad_k and grad_v
  size_t (*columns_scratch)(const AttentionArgs&);
  void (*columns)(const AttentionArgs&, int64_t task, void* scratch);
};

// Null where an instruction set has no kernels of its own for this storage (double: portable only).
const AttentionKernels* attention_portable(Storage);
const AttentionKernels* attention_avx2(Storage);
const AttentionKernels* attention_avx512(Storage);
const AttentionKernels* attention_avx512_bf16(Storage);

}  // namespace p3b
