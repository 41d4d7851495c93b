// The kernels of AVX-512 on any machine: attention and merging, compiled over emulated intrinsics (avx512_on_cpu/immintrin.h; wide_kernels.sh
// builds), against the portable kernels in float64. Usage: wide_kernels [CASES] [SEED]; exit status 1 and a line on the first wrong value.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/attention_args.h"
#include "../../csrc/cpu/merge_kernels.h"
#include "../../csrc/cpu/simd.h"

using namespace p3b;

namespace {

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

// Within `tolerance` of the largest wanted value, or of `least` where all are smaller.
template <class X, class Y>
void compare(const char* what, const std::vector<X>& got, const std::vector<Y>& wanted, double tolerance, const Shapes& s, const char* kernels,
             double least = 1e-3) {
  double largest = least;
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
void check(const char* name, const AttentionKernels& kernels, const Shapes& s, const std::vector<float>& values, double tolerance, double exact,
           double of_gradients) {
  Call<T, float> got(s, values);
  Call<double, double> wanted(s, values);
  for (size_t i = 0; i < got.qkv.size(); i++) wanted.qkv[i] = widen(got.qkv[i]);
  for (size_t i = 0; i < got.grad_out.size(); i++) wanted.grad_out[i] = widen(got.grad_out[i]);
  got.run(kernels);
  wanted.run(*attention_portable(Storage::kDouble));
  compare("out", got.out, wanted.out, tolerance, s, name);
  compare("lse", got.lse, wanted.lse, exact, s, name, 1);  // sums of products of size 1 may cancel
  compare("cls_attention", got.cls, wanted.cls, exact, s, name);
  compare("entropy", got.entropy, wanted.entropy, exact, s, name, 1);
  compare("value_square", got.square, wanted.square, exact, s, name);
  compare("to_cls", got.to_cls, wanted.to_cls, exact, s, name);
  compare("grad_qkv", got.grad_qkv, wanted.grad_qkv, of_gradients, s, name);
  const int64_t heads = s.B * s.H, row = got.a.gate_row;
  compare("received", sum_parts(got.received, heads, s.chunks, s.N), sum_parts(wanted.received, heads, s.chunks, s.N), exact, s, name);
  if (s.gate)
    compare("grad_gate", sum_parts(got.gate_partial, heads, s.chunks + 1, row), sum_parts(wanted.gate_partial, heads, s.chunks + 1, row),
            of_gradients, s, name);
  compare("grad_size", sum_parts(got.size_partial, heads, s.chunks, s.N), sum_parts(wanted.size_partial, heads, s.chunks, s.N), of_gradients, s,
          name);
}

// Matching and the sums of rows. Rows [N, C] are multiples of a few directions, so that the best partner is often shared: ties.
template <class T>
void check_rows(const char* name, RowType type, int64_t N, int64_t C, std::mt19937& random, double rounding) {
  const RowKernels &kernels = kRowKernelsAvx512[int(type)], &portable = kRowKernelsPortable[int(RowType::kFloat64)];
  const auto fail = [&](const char* what, int64_t at, double x, double y) {
    printf("%s: %s[%d] is %g, must be %g: N %d C %d\n", name, what, int(at), x, y, int(N), int(C));
    exit(1);
  };
  std::normal_distribution<float> normal;
  const int64_t stride = C + int64_t(random() % 3);
  std::vector<T> x(size_t(N * stride + C)), g(static_cast<size_t>(C));
  for (T& v : x) narrow(normal(random), &v);
  for (T& v : g) narrow(normal(random), &v);
  for (int64_t n = 0; n + 2 < N; n += 3) std::copy_n(&x[size_t(n * stride)], C, &x[size_t((n + 2) * stride)]);  // equal rows: ties
  std::vector<double> exact, exact_g;
  for (const T& v : x) exact.push_back(widen(v));
  for (const T& v : g) exact_g.push_back(widen(v));

  std::vector<int32_t> sources, destinations, rows;
  for (int64_t n = 0; n < N; n++) (random() % 2 ? sources : destinations).push_back(int32_t(n));
  const int64_t S = int64_t(sources.size()), D = int64_t(destinations.size());
  const auto match = [&](const RowKernels& k, const void* data, void* best, int32_t* partner) {
    std::vector<char> memory(size_t(k.match_scratch(C, S, D)) + 64, char(0xff));
    void* scratch = memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
    return k.match(data, stride, C, sources.data(), S, destinations.data(), D, best, partner, scratch);
  };
  std::vector<float> best(static_cast<size_t>(S));
  std::vector<double> wanted(static_cast<size_t>(S));
  std::vector<int32_t> partner(static_cast<size_t>(S)), wanted_partner(static_cast<size_t>(S));
  if (match(kernels, x.data(), best.data(), partner.data()) != -1) fail("match", 0, 0, -1);
  match(portable, exact.data(), wanted.data(), wanted_partner.data());
  for (int64_t i = 0; i < S && D > 0; i++) {
    if (!(std::fabs(best[size_t(i)] - wanted[size_t(i)]) <= 2e-6)) fail("best", i, best[size_t(i)], wanted[size_t(i)]);
    if (partner[size_t(i)] == wanted_partner[size_t(i)]) continue;
    // Another partner only where it is as good up to rounding, and never the later of two equal rows.
    const T *a = &x[size_t(destinations[size_t(partner[size_t(i)])] * stride)],
            *b = &x[size_t(destinations[size_t(wanted_partner[size_t(i)])] * stride)];
    if (memcmp(a, b, size_t(C) * sizeof(T)) == 0) fail("partner", i, partner[size_t(i)], wanted_partner[size_t(i)]);
  }
  const int64_t at = int64_t(random() % uint64_t(N));
  const T kept = x[size_t(at * stride + C / 2)];
  narrow(float(at % 2 ? __builtin_inf() : __builtin_nan("")), &x[size_t(at * stride + C / 2)]);
  const int64_t bad = match(kernels, x.data(), best.data(), partner.data());
  if (bad != at) fail("row that is not finite", 0, double(bad), double(at));
  std::vector<T> y(static_cast<size_t>(C));
  const int32_t row = int32_t(at);
  kernels.weighted_sum(y.data(), x.data(), stride, &row, nullptr, 1, C);
  if (std::isfinite(widen(y[size_t(C / 2)])))
    fail("weighted_sum of a row that is not finite", C / 2, widen(y[size_t(C / 2)]), at % 2 ? __builtin_inf() : __builtin_nan(""));
  x[size_t(at * stride + C / 2)] = kept;

  std::vector<float> coeff;
  std::vector<double> exact_coeff;
  for (int64_t i = 0; i < 1 + int64_t(random() % 4); i++) {
    rows.push_back(int32_t(random() % uint64_t(N)));
    coeff.push_back(std::fabs(normal(random)));
    exact_coeff.push_back(coeff.back());
  }
  std::vector<double> exact_y(static_cast<size_t>(C));
  kernels.weighted_sum(y.data(), x.data(), stride, &row, coeff.data(), 1, C);
  for (int64_t c = 0; c < C; c++) {  // one product, rounded once more: exactly as in simd.h
    T once;
    narrow(float(widen(x[size_t(at * stride + c)])) * coeff[0], &once);
    if (widen(y[size_t(c)]) != widen(once)) fail("product", c, widen(y[size_t(c)]), widen(once));
  }
  for (const bool weighted : {false, true}) {
    kernels.weighted_sum(y.data(), x.data(), stride, rows.data(), weighted ? coeff.data() : nullptr, int64_t(rows.size()), C);
    portable.weighted_sum(exact_y.data(), exact.data(), stride, rows.data(), weighted ? exact_coeff.data() : nullptr, int64_t(rows.size()), C);
    for (size_t c = 0; c < y.size(); c++)
      if (!(std::fabs(widen(y[c]) - exact_y[c]) <= rounding * (1 + std::fabs(exact_y[c])))) fail("weighted_sum", int64_t(c), widen(y[c]), exact_y[c]);
    for (size_t c = 0; c < y.size(); c++) exact_y[c] = widen(y[c]);
    const double dot = kernels.dot_difference(g.data(), &x[size_t(at * stride)], weighted ? y.data() : nullptr, C);
    const double exact_dot = portable.dot_difference(exact_g.data(), &exact[size_t(at * stride)], weighted ? exact_y.data() : nullptr, C);
    if (!(std::fabs(dot - exact_dot) <= 2e-6 * double(C + 20))) fail("dot_difference", weighted, dot, exact_dot);
  }
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
    check<float>("avx512 float32", *attention_avx512(Storage::kFloat), s, values, 2e-5, 2e-5, 2e-5);
    check<Half>("avx512 float16", *attention_avx512(Storage::kHalf), s, values, 2e-3, 2e-5, 2e-3);
    check<BFloat16>("avx512 bfloat16", *attention_avx512(Storage::kBFloat16), s, values, 2e-2, 2e-5, 2e-2);
    // With a gate the gated inputs are rounded too; lse and entropy then see 2^-9 of the logits, and gradients, which sum differences of such
    // numbers, lose more where attention is concentrated: bfloat16's own error, whoever computes.
    check<BFloat16>("avx512_bf16 bfloat16", *attention_avx512_bf16(Storage::kBFloat16), s, values, s.gate ? 4e-2 : 2e-2, s.gate ? 4e-2 : 2e-5,
                    s.gate ? 1e-1 : 2e-2);
    const int64_t N = up_to(120), C = number % 2 ? up_to(200) : 64;
    check_rows<float>("avx512 float32", RowType::kFloat32, N, C, random, 1e-6);
    check_rows<Half>("avx512 float16", RowType::kFloat16, N, C, random, 1e-3);
    check_rows<BFloat16>("avx512 bfloat16", RowType::kBFloat16, N, C, random, 8e-3);
  }
  printf("%d cases of every AVX-512 kernel\n", cases);
}
