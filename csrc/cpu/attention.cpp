// masked_attention, its gradient and attention_columns on the CPU: checks, allocation, threads and the choice of an instruction set.
// The arithmetic is in attention_kernels.h and the headers that it includes.
#include "../attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "attention_args.h"
#include "isa.h"
#include "memory.h"

namespace p3b {
namespace {

using OptionalTensor = std::optional<Tensor>;

Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::Double:
      return Storage::kDouble;
    default:
      return Storage::kFloat;
  }
}

const AttentionKernels& kernels_for(ScalarType dtype) {
  const Storage storage = storage_of(dtype);
  const AttentionKernels* found = nullptr;
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
      found = attention_avx512_bf16(storage);
      break;
    case Isa::kAvx512:
      found = attention_avx512(storage);
      break;
    case Isa::kAvx2:
      found = attention_avx2(storage);
      break;
    case Isa::kPortable:
      break;
  }
#endif
  return found ? *found : *attention_portable(storage);
}

// A thread's scratch memory lives as long as the thread: fresh pages for every call would cost as much as the call at small sizes.
void* scratch_memory(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t held = 0;
  if (bytes > held) {
    constexpr size_t kPage = 4096;
    memory.reset();  // first, so that both are never held at once
    memory.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
    held = memory ? bytes : 0;
  }
  return memory.get();
}

// Runs work(task, scratch) for every task. Threads take tasks as they come: which thread runs a task does not change its result, and an
// even split would wait for the slowest core.
template <class Work>
void for_each_task(int64_t tasks, size_t scratch_bytes, const Work& work) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {  // an exception must not cross its C interface
    void* scratch = scratch_memory(scratch_bytes);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    for (int64_t task = next++; task < tasks; task = next++) work(task, scratch);
  });
  if (out_of_memory) throw std::bad_alloc();
}

Heads heads(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// [B, N, H, D], or one of the three in [B, N, 3, H, D].
Heads heads_of_tokens(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)}; }
Heads heads_of_packed(const Tensor& t, int64_t which) {
  const int64_t bytes = t.scalar_type() == ScalarType::Double ? 8 : t.scalar_type() == ScalarType::Float ? 4 : 2;
  return {static_cast<char*>(t.data_ptr()) + which * t.stride(2) * bytes, t.stride(0), t.stride(3), t.stride(1)};
}

template <class A>
std::vector<A> log_sizes(const char* op, const Tensor& size) {
  const int64_t B = size.size(0), N = size.size(1), batch = size.stride(0), token = size.stride(1);
  const A* from = static_cast<const A*>(size.data_ptr());
  std::vector<A> logs(static_cast<size_t>(B * N));
  for (int64_t b = 0; b < B; b++)
    for (int64_t n = 0; n < N; n++) {
      const A x = from[b * batch + n * token];
      P3B_CHECK(x > 0 && std::isfinite(x), op, ": token_size must be > 0 and finite, got ", x, " at [", b, ", ", n, "]");
      logs[static_cast<size_t>(b * N + n)] = std::log2(x);
    }
  return logs;
}

// Rows of a multiple of 32 channels, so that the kernels load whole vectors of any width.
template <class A>
std::vector<A> padded_gate(const Tensor& gate, int64_t row) {
  const bool per_head = gate.dim() == 2;
  const int64_t heads = per_head ? gate.size(0) : 1, D = gate.size(gate.dim() - 1);
  const int64_t head = per_head ? gate.stride(0) : 0, channel = gate.stride(gate.dim() - 1);
  std::vector<A> rows(static_cast<size_t>(heads * row));
  for (int64_t h = 0; h < heads; h++)
    for (int64_t d = 0; d < D; d++) rows[static_cast<size_t>(h * row + d)] = static_cast<const A*>(gate.data_ptr())[h * head + d * channel];
  return rows;
}

// The arguments that all three ops have, and what they point to.
template <class A>
struct Call {
  AttentionArgs args{};
  std::vector<A> bias, gate;

  Call(const char* op, const Attention& s, const Heads& q, const Heads& k, const OptionalTensor& key_mask, const OptionalTensor& token_size,
       const OptionalTensor& channel_gate) {
    args.B = s.B, args.H = s.H, args.N = s.N, args.D = s.D;
    args.scale = s.scale;
    args.chunks = 1;
    args.q = q, args.k = k;
    if (key_mask) {
      args.key_mask = static_cast<const uint8_t*>(key_mask->data_ptr());
      args.mask_batch = key_mask->stride(0), args.mask_token = key_mask->stride(1);
    }
    if (token_size) {
      bias = log_sizes<A>(op, *token_size);
      args.bias = bias.data();
    }
    args.gate_row = (s.D + 31) / 32 * 32;
    if (channel_gate) {
      gate = padded_gate<A>(*channel_gate, args.gate_row);
      args.gate = gate.data();
      args.gate_head = s.gate_per_head ? args.gate_row : 0;
    }
  }
};

// Where a sum over query rows is taken, the number of chunks must not depend on threads. 32 tasks feed many cores; below 96 rows a chunk's
// own packing of K and V shows.
int64_t chunks_of_sums(const Attention& s) {
  const int64_t wanted = (32 + s.B * s.H - 1) / std::max<int64_t>(1, s.B * s.H);
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, s.N / 96));
}

// Rows of the forward are independent: split heads only as far as the threads need it.
int64_t chunks_of_rows(const Attention& s) {
  const int64_t tasks = 2 * static_cast<int64_t>(torch::stable::get_num_threads()), heads = std::max<int64_t>(1, s.B * s.H);
  return heads >= tasks ? 1 : std::clamp<int64_t>((tasks + heads - 1) / heads, 1, std::max<int64_t>(1, s.N / 48));
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, shape, dtype);
  prefer_large_pages(t);
  return t;
}

// out, lse, cls_attention, entropy, value_norm
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Outputs forward(const char* op, const Attention& s, const Tensor& like, const Heads& q, const Heads& k, const Heads& v,
                const OptionalTensor& key_mask, const OptionalTensor& token_size, const OptionalTensor& channel_gate, int64_t aux) {
  const ScalarType acc = acc_dtype(like.scalar_type());
  Tensor out = empty(like, {s.B, s.N, s.H, s.D}, like.scalar_type());
  Tensor lse = empty(like, {s.B, s.H, s.N}, acc);
  // Outputs may not alias one another: each absent one is an empty tensor of its own.
  Tensor cls_attention = aux & kClsAttention ? empty(like, {s.B, s.H, s.N}, acc) : empty(like, {0}, acc);
  Tensor entropy = aux & kEntropy ? empty(like, {s.B, s.H, s.N}, acc) : empty(like, {0}, acc);
  Tensor value_norm = aux & kValueNorm ? empty(like, {s.B, s.N}, acc) : empty(like, {0}, acc);

  Call<A> call(op, s, q, k, key_mask, token_size, channel_gate);
  AttentionArgs& args = call.args;
  std::vector<A> squares(static_cast<size_t>(aux & kValueNorm ? s.B * s.H * s.N : 0));
  args.v = v;
  args.out = heads_of_tokens(out);
  args.lse = lse.data_ptr();
  args.cls_attention = aux & kClsAttention ? cls_attention.data_ptr() : nullptr;
  args.entropy = aux & kEntropy ? entropy.data_ptr() : nullptr;
  args.value_square = aux & kValueNorm ? squares.data() : nullptr;
  args.chunks = chunks_of_rows(s);
  const AttentionKernels& kernels = kernels_for(like.scalar_type());
  for_each_task(s.B * s.H * args.chunks, kernels.forward_scratch(args), [&](int64_t task, void* scratch) { kernels.forward(args, task, scratch); });

  if (aux & kValueNorm) {
    A* norm = static_cast<A*>(value_norm.data_ptr());
    std::fill(norm, norm + s.B * s.N, A(0));
    for (int64_t head = 0; head < s.B * s.H; head++) {
      A* row = norm + head / s.H * s.N;
      for (int64_t n = 0; n < s.N; n++) row[n] += squares[static_cast<size_t>(head * s.N + n)];
    }
    for (int64_t i = 0; i < s.B * s.N; i++) norm[i] = std::sqrt(norm[i]);
  }
  return {out, lse, cls_attention, entropy, value_norm};
}

// Sums the gate's gradient over chunks, then images (and heads, where they share the gate).
template <class A>
void sum_gate(const AttentionArgs& args, bool per_head, A* to) {
  const A* from = static_cast<const A*>(args.grad_gate_partial);
  std::fill(to, to + (per_head ? args.H : 1) * args.D, A(0));
  for (int64_t head = 0; head < args.B * args.H; head++)
    for (int64_t part = 0; part <= args.chunks; part++, from += args.gate_row)
      for (int64_t d = 0; d < args.D; d++) to[(per_head ? head % args.H * args.D : 0) + d] += from[d];
}

// d log(size) / d size = 1 / size, summed over heads and chunks.
template <class A>
void sum_sizes(const AttentionArgs& args, const Tensor& size, A* to) {
  const A* from = static_cast<const A*>(args.grad_size_partial);
  for (int64_t b = 0; b < args.B; b++, to += args.N) {
    std::fill(to, to + args.N, A(0));
    for (int64_t part = 0; part < args.H * args.chunks; part++, from += args.N)
      for (int64_t n = 0; n < args.N; n++) to[n] += from[n];
    for (int64_t n = 0; n < args.N; n++) to[n] /= static_cast<const A*>(size.data_ptr())[b * size.stride(0) + n * size.stride(1)];
  }
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(const char* op, const Attention& s, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const OptionalTensor& key_mask, const OptionalTensor& token_size,
                                            const OptionalTensor& channel_gate, int64_t which) {
  const bool for_size = token_size && which & kTokenSize, for_gate = channel_gate && which & kChannelGate;
  const ScalarType acc = acc_dtype(q.scalar_type());
  Tensor grad_qkv = empty(q, {s.B, s.N, 3, s.H, s.D}, q.scalar_type());
  Tensor grad_size = for_size ? empty(q, {s.B, s.N}, acc) : empty(q, {0}, acc);
  Tensor grad_gate = !for_gate ? empty(q, {0}, acc) : s.gate_per_head ? empty(q, {s.H, s.D}, acc) : empty(q, {s.D}, acc);

  Call<A> call(op, s, heads(q), heads(k), key_mask, token_size, channel_gate);
  AttentionArgs& args = call.args;
  args.chunks = chunks_of_sums(s);
  const int64_t heads_count = s.B * s.H, tasks = heads_count * args.chunks;
  const auto workspace = [](int64_t count) { return std::unique_ptr<A[]>(count ? new A[static_cast<size_t>(count)] : nullptr); };
  const auto kv_partial = workspace(args.chunks > 1 ? tasks * 2 * s.N * args.gate_row : 0);
  const auto gate_partial = workspace(for_gate ? heads_count * (args.chunks + 1) * args.gate_row : 0);
  const auto size_partial = workspace(for_size ? tasks * s.N : 0);
  args.v = heads(v);
  args.grad_out = heads_of_tokens(grad_out);
  args.grad_q = heads_of_packed(grad_qkv, 0);
  args.grad_k = heads_of_packed(grad_qkv, 1);
  args.grad_v = heads_of_packed(grad_qkv, 2);
  args.grad_kv_partial = kv_partial.get();
  args.grad_gate_partial = gate_partial.get();
  args.grad_size_partial = size_partial.get();
  const AttentionKernels& kernels = kernels_for(q.scalar_type());
  const size_t bytes = kernels.backward_scratch(args);
  for_each_task(tasks, bytes, [&](int64_t task, void* scratch) { kernels.backward(args, task, scratch); });
  if (args.chunks > 1) for_each_task(heads_count, bytes, [&](int64_t head, void* scratch) { kernels.backward_finish(args, head, scratch); });
  if (for_gate) sum_gate(args, s.gate_per_head, static_cast<A*>(grad_gate.data_ptr()));
  if (for_size) sum_sizes(args, *token_size, static_cast<A*>(grad_size.data_ptr()));
  return {grad_qkv, grad_size, grad_gate};
}

template <class A>
std::tuple<Tensor, Tensor> columns(const char* op, const Attention& s, const Tensor& q, const Tensor& k, const Tensor& lse,
                                   const OptionalTensor& key_mask, const OptionalTensor& token_size, const OptionalTensor& channel_gate,
                                   int64_t which) {
  const ScalarType acc = acc_dtype(q.scalar_type());
  Tensor to_cls = which & kToCls ? empty(q, {s.B, s.H, s.N}, acc) : empty(q, {0}, acc);
  Tensor received = which & kReceived ? empty(q, {s.B, s.H, s.N}, acc) : empty(q, {0}, acc);

  Call<A> call(op, s, heads(q), heads(k), key_mask, token_size, channel_gate);
  AttentionArgs& args = call.args;
  args.chunks = chunks_of_sums(s);
  const int64_t tasks = s.B * s.H * args.chunks;
  std::vector<A> partial(static_cast<size_t>(which & kReceived ? tasks * s.N : 0));
  args.saved_lse = lse.data_ptr();
  args.to_cls = which & kToCls ? to_cls.data_ptr() : nullptr;
  args.received_partial = which & kReceived ? partial.data() : nullptr;
  const AttentionKernels& kernels = kernels_for(q.scalar_type());
  for_each_task(tasks, kernels.columns_scratch(args), [&](int64_t task, void* scratch) { kernels.columns(args, task, scratch); });
  if (which & kReceived) {
    A* to = static_cast<A*>(received.data_ptr());
    const A* from = partial.data();
    for (int64_t head = 0; head < s.B * s.H; head++, to += s.N) {
      std::fill(to, to + s.N, A(0));
      for (int64_t chunk = 0; chunk < args.chunks; chunk++, from += s.N)
        for (int64_t n = 0; n < s.N; n++) to[n] += from[n];
      for (int64_t n = 0; n < s.N; n++) to[n] /= static_cast<A>(s.N);
    }
  }
  return {to_cls, received};
}

// With a contiguous last axis: autograd hands over expanded gradients (of a sum) as they are.
Tensor with_rows(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

Outputs masked_attention(Tensor q, Tensor k, Tensor v, OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate, double scale,
                         int64_t aux) {
  const char* op = "masked_attention";
  const Attention s = check_attention(op, q, k, &v, key_mask, token_size, channel_gate, scale);
  const auto run = q.scalar_type() == ScalarType::Double ? &forward<double> : &forward<float>;
  return run(op, s, q, heads(q), heads(k), heads(v), key_mask, token_size, channel_gate, aux);
}

// Errors name masked_attention, the op that users know.
Outputs masked_attention_packed(Tensor qkv, OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate, double scale,
                                int64_t aux) {
  const char* op = "masked_attention";
  const Attention s = check_packed(op, qkv, key_mask, token_size, channel_gate, scale);
  const auto run = qkv.scalar_type() == ScalarType::Double ? &forward<double> : &forward<float>;
  return run(op, s, qkv, heads_of_packed(qkv, 0), heads_of_packed(qkv, 1), heads_of_packed(qkv, 2), key_mask, token_size, channel_gate, aux);
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                             OptionalTensor key_mask, OptionalTensor token_size, OptionalTensor channel_gate,
                                                             double scale, int64_t which) {
  const char* op = "masked_attention_backward";
  const Attention s = check_attention(op, q, k, &v, key_mask, token_size, channel_gate, scale);
  check_attention_grad(op, s, q, grad_out, out, lse);
  const Tensor grad_rows = with_rows(grad_out);  // out and lse: for the CUDA kernels
  if (q.scalar_type() == ScalarType::Double) return backward<double>(op, s, grad_rows, q, k, v, key_mask, token_size, channel_gate, which);
  return backward<float>(op, s, grad_rows, q, k, v, key_mask, token_size, channel_gate, which);
}

std::tuple<Tensor, Tensor> attention_columns(Tensor q, Tensor k, Tensor lse, OptionalTensor key_mask, OptionalTensor token_size,
                                             OptionalTensor channel_gate, double scale, int64_t which) {
  const char* op = "attention_columns";
  const Attention s = check_attention(op, q, k, nullptr, key_mask, token_size, channel_gate, scale);
  check_dtype(op, "lse", lse, acc_dtype(q.scalar_type()));
  P3B_CHECK(lse.dim() == 3 && lse.size(0) == s.B && lse.size(1) == s.H && lse.size(2) == s.N && lse.is_contiguous(), op,
            ": lse must be contiguous [B, H, N], got shape ", shape(lse));
  if (q.scalar_type() == ScalarType::Double) return columns<double>(op, s, q, k, lse, key_mask, token_size, channel_gate, which);
  return columns<float>(op, s, q, k, lse, key_mask, token_size, channel_gate, which);
}

}  // namespace
}  // namespace p3b

STABLE_TORCH_LIBRARY_IMPL(p3b_ext, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&p3b::masked_attention));
  m.impl("masked_attention_packed", TORCH_BOX(&p3b::masked_attention_packed));
  m.impl("masked_attention_backward", TORCH_BOX(&p3b::masked_attention_backward));
  m.impl("attention_columns", TORCH_BOX(&p3b::attention_columns));
}
