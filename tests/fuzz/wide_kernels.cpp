// The block shapes of AVX-512 on any machine: the kernels of csrc/cpu/attention_kernels.h over a 16-lane vector type that the compiler emulates,
// once with floats and once with pairs of bfloat16, against the same kernels in float64. Only the intrinsics of csrc/cpu/simd_avx512.h stay
// untested. Usage: wide_kernels [CASES] [SEED]; exit status 1 and a line on the first wrong value.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/attention_portable.cpp"

using namespace p3b;

namespace {

struct Wide : Generic<float, 16, 12> {
  static R load_bits(const void* p) { return load(static_cast<const float*>(p)); }
  static R set_bits(const void* p) {
    float x;
    memcpy(&x, p, sizeof x);
    R r;
    for (int i = 0; i < W; i++) r[i] = x;
    return r;
  }
  static R pairs(R low, R high) {
    R r;
    for (int i = 0; i < W; i++) {
      BFloat16 a, b;
      narrow(low[i], &a);
      narrow(high[i], &b);
      r[i] = float_of(uint32_t(b.bits) << 16 | a.bits);
    }
    return r;
  }
  static R dot_pairs(R c, R a, R b) {
    for (int i = 0; i < W; i++) {
      const uint32_t x = bits_of(a[i]), y = bits_of(b[i]);
      c[i] += float_of(x & 0xffff0000) * float_of(y & 0xffff0000);
      c[i] += float_of(x << 16) * float_of(y << 16);
    }
    return c;
  }
};

struct Shapes {
  int64_t B, H, N, D, chunks;
  bool mask, size, gate;
};

// Inputs and results of one call in storage T with sums in A.
template <class T, class A>
struct Call {
  std::vector<T> qkv, grad_out, out, grad_qkv;
  std::vector<A> bias, gate, lse, cls, entropy, square, kv_partial, gate_partial, size_partial, to_cls, received;
  std::vector<uint8_t> mask;
  AttentionArgs a{};

  Call(const Shapes& s, const std::vector<float>& values) {
    size_t at = 0;
    const auto fill = [&](auto& to, int64_t count) {
      to.resize(size_t(count));
      for (auto& x : to) narrow(A(values[at++]), &x);
    };
    const int64_t row = round_up(s.D, 32), heads = s.B * s.H, tasks = heads * s.chunks;
    fill(qkv, s.B * s.N * 3 * s.H * s.D);
    fill(grad_out, s.B * s.N * s.H * s.D);
    fill(bias, s.B * s.N);
    gate.assign(size_t(s.H * row), 0);
    for (int64_t h = 0; h < s.H; h++)
      for (int64_t d = 0; d < s.D; d++) gate[size_t(h * row + d)] = std::fabs(A(values[at++]));
    for (int64_t i = 0; i < s.B * s.N; i++) mask.push_back(values[at++] > -0.5f);
    const auto none = std::nan("");  // whatever is left unwritten shows
    const auto poison = [&](auto& to, int64_t count) {
      to.resize(size_t(count));
      for (auto& x : to) narrow(A(none), &x);
    };
    poison(out, s.B * s.N * s.H * s.D), poison(grad_qkv, int64_t(qkv.size()));
    for (auto* to : {&lse, &cls, &entropy, &square, &to_cls}) poison(*to, heads * s.N);
    poison(kv_partial, s.chunks > 1 ? tasks * 2 * s.N * row : 0);
    poison(gate_partial, heads * (s.chunks + 1) * row), poison(size_partial, tasks * s.N), poison(received, tasks * s.N);

    a.B = s.B, a.H = s.H, a.N = s.N, a.D = s.D, a.chunks = s.chunks, a.scale = 1 / std::sqrt(double(s.D));
    const auto packed = [&](T* p, int64_t which) { return Heads{p + which * s.H * s.D, s.N * 3 * s.H * s.D, s.D, 3 * s.H * s.D}; };
    a.q = packed(qkv.data(), 0), a.k = packed(qkv.data(), 1), a.v = packed(qkv.data(), 2);
    a.grad_q = packed(grad_qkv.data(), 0), a.grad_k = packed(grad_qkv.data(), 1), a.grad_v = packed(grad_qkv.data(), 2);
    a.out = {out.data(), s.N * s.H * s.D, s.D, s.H * s.D}, a.grad_out = {grad_out.data(), s.N * s.H * s.D, s.D, s.H * s.D};
    if (s.mask) a.key_mask = mask.data(), a.mask_batch = s.N, a.mask_token = 1;
    a.bias = s.size ? bias.data() : nullptr;
    a.gate = s.gate ? gate.data() : nullptr;
    a.gate_head = row, a.gate_row = row;
    a.lse = lse.data(), a.cls_attention = cls.data(), a.entropy = entropy.data(), a.value_square = square.data();
    a.grad_kv_partial = s.chunks > 1 ? kv_partial.data() : nullptr;
    a.grad_gate_partial = gate_partial.data(), a.grad_size_partial = size_partial.data();
    a.saved_lse = lse.data(), a.to_cls = to_cls.data(), a.received_partial = received.data();
  }

  void run(const AttentionKernels& kernels) {
    const size_t bytes = std::max({kernels.forward_scratch(a), kernels.backward_scratch(a), kernels.columns_scratch(a)});
    std::vector<char> memory(bytes + 64, char(0xff));  // NaN
    void* scratch = memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
    const int64_t heads = a.B * a.H;
    for (int64_t task = 0; task < heads * a.chunks; task++) {
      kernels.forward(a, task, scratch);
      kernels.columns(a, task, scratch);
      kernels.backward(a, task, scratch);
    }
    for (int64_t head = 0; a.chunks > 1 && head < heads; head++) kernels.backward_finish(a, head, scratch);
  }
};

template <class X, class Y>
void compare(const char* what, const std::vector<X>& got, const std::vector<Y>& wanted, double tolerance, const Shapes& s, const char* kernels) {
  double largest = 1e-3;
  for (const Y& y : wanted)
    if (std::isfinite(double(widen(y)))) largest = std::fmax(largest, std::fabs(double(widen(y))));
  for (size_t i = 0; i < got.size(); i++) {
    const double x = widen(got[i]), y = widen(wanted[i]);
    if (x == y || (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= tolerance * largest) continue;
    printf("%s: %s[%zu] is %g, must be %g: B %d H %d N %d D %d chunks %d mask %d size %d gate %d\n", kernels, what, i, x, y, int(s.B), int(s.H),
           int(s.N), int(s.D), int(s.chunks), s.mask, s.size, s.gate);
    exit(1);
  }
}

// x [heads, parts, row] summed over parts: the chunks of narrow and of wide tiles begin at other rows.
template <class A>
std::vector<double> sum_parts(const std::vector<A>& x, int64_t heads, int64_t parts, int64_t row) {
  std::vector<double> sums(size_t(heads * row));
  for (int64_t i = 0; i < heads * parts * row; i++)
    if (x[size_t(i)] == x[size_t(i)]) sums[size_t(i / (parts * row) * row + i % row)] += double(x[size_t(i)]);  // NaN: channels beyond D
  return sums;
}

template <class T>
void check(const char* name, const AttentionKernels& kernels, const Shapes& s, const std::vector<float>& values, double tolerance, double exact) {
  Call<T, float> got(s, values);
  Call<double, double> wanted(s, values);
  for (size_t i = 0; i < got.qkv.size(); i++) wanted.qkv[i] = widen(got.qkv[i]);
  for (size_t i = 0; i < got.grad_out.size(); i++) wanted.grad_out[i] = widen(got.grad_out[i]);
  got.run(kernels);
  wanted.run(*attention_portable(Storage::kDouble));
  compare("out", got.out, wanted.out, tolerance, s, name);
  compare("lse", got.lse, wanted.lse, exact, s, name);
  compare("cls_attention", got.cls, wanted.cls, exact, s, name);
  compare("entropy", got.entropy, wanted.entropy, exact, s, name);
  compare("value_square", got.square, wanted.square, exact, s, name);
  compare("to_cls", got.to_cls, wanted.to_cls, exact, s, name);
  compare("grad_qkv", got.grad_qkv, wanted.grad_qkv, tolerance, s, name);
  const int64_t heads = s.B * s.H, row = got.a.gate_row;
  compare("received", sum_parts(got.received, heads, s.chunks, s.N), sum_parts(wanted.received, heads, s.chunks, s.N), exact, s, name);
  if (s.gate)
    compare("grad_gate", sum_parts(got.gate_partial, heads, s.chunks + 1, row), sum_parts(wanted.gate_partial, heads, s.chunks + 1, row), tolerance,
            s, name);
  compare("grad_size", sum_parts(got.size_partial, heads, s.chunks, s.N), sum_parts(wanted.size_partial, heads, s.chunks, s.N), tolerance, s, name);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 200;
  std::mt19937 random(argc > 2 ? unsigned(atol(argv[2])) : 0u);
  std::normal_distribution<float> normal;
  for (int number = 0; number < cases; number++) {
    const auto up_to = [&](int64_t n) { return 1 + int64_t(random() % uint64_t(n)); };
    Shapes s{up_to(2),          up_to(2),         number % 8 ? up_to(90) : up_to(300), number % 3 ? up_to(72) : 64, 1, random() % 2 == 0,
             random() % 2 == 0, random() % 2 == 0};
    s.chunks = random() % 2 ? 1 : up_to(3);
    std::vector<float> values(size_t(s.B * s.N * s.H * s.D * 4 + 2 * s.B * s.N + s.H * s.D));
    for (float& x : values) x = normal(random);
    check<float>("wide float", Table<Single<Wide>, float>::kernels, s, values, 2e-5, 2e-5);
    check<Half>("wide float16", Table<Single<Wide>, Half>::kernels, s, values, 2e-3, 2e-5);
    // With a gate the gated inputs are rounded too; lse and entropy then see 2^-9 of the logits.
    check<BFloat16>("wide bfloat16 pairs", Table<Paired<Wide>, BFloat16>::kernels, s, values, s.gate ? 4e-2 : 2e-2, s.gate ? 4e-2 : 2e-5);
  }
  printf("%d cases of every wide kernel\n", cases);
}
