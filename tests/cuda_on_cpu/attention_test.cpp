// The attention kernels against a float64 reference: forward, side outputs, columns, backward; 16-bit and float32.
// `attention_test small` leaves out the longer cases, for the sanitizers; AddressSanitizer runs them in one dtype (medium).
#include "attention.cu"
#include "attention_backward.cu"
#include "attention_float.cu"

#include "testing.h"

using namespace p3b::cuda;

struct Case {
  int B, H, N, D;
  bool mask, size;
  int gate;             // 0 none, 1 [D], 2 [H, D]
  float logits = 1;     // factor on q
  bool packed = true;   // views of [B, N, 3, H, D], else three contiguous [B, H, N, D]
  bool dead = false;    // mask every key of image 0
  float scale = 1;      // factor on 1 / sqrt(D)
};

// Inputs rounded to T, kept as double.
struct Inputs {
  Case c;
  double scale;
  std::vector<double> q, k, v, grad;  // [B, H, N, D]
  std::vector<float> gate, size;
  std::vector<char> mask;

  size_t at(int b, int h, int n, int d = 0) const { return ((size_t(b) * c.H + h) * c.N + n) * c.D + d; }
  double g(int h, int d) const { return c.gate == 0 ? 1 : gate[c.gate == 1 ? d : h * c.D + d]; }

  template <class T>
  static Inputs make(const Case& c, unsigned seed) {
    Inputs in{};
    Random random(seed);
    in.c = c;
    in.scale = c.scale / std::sqrt(double(c.D));
    for (auto* x : {&in.q, &in.k, &in.v, &in.grad}) {
      x->resize(size_t(c.B) * c.H * c.N * c.D);
      for (auto& y : *x) y = to_float(from_float<T>(random.normal() * (x == &in.q ? c.logits : 1.f)));
    }
    in.gate.resize(size_t(c.H) * c.D);
    for (auto& x : in.gate) x = random.below(8) ? random.uniform(0.5f, 1.5f) : 0.f;
    in.size.resize(size_t(c.B) * c.N);
    for (auto& x : in.size) x = float(1 + random.below(5));
    in.mask.resize(size_t(c.B) * c.N);
    for (auto& x : in.mask) x = random.below(4) != 0;
    if (c.dead && c.B) std::fill(in.mask.begin(), in.mask.begin() + c.N, 0);
    return in;
  }
};

// Everything that follows from the inputs, computed in A. `gated(x, g, which)` makes an operand of an element of q, k or v
// (0, 1, 2) and its gate, `result` rounds what a tensor operation puts out. With doubles and no rounding this is the
// truth; with floats and every operand and result rounded to T, what PyTorch makes of the formula in that dtype.
struct Results {
  std::vector<double> out, lse, cls, entropy, value_norm, to_cls, received;
  std::vector<double> grad_q, grad_k, grad_v, grad_size, grad_gate;

  template <class A, class Gated, class Result>
  static Results solve(const Inputs& in, Gated gated, Result result) {
    const Case& c = in.c;
    const int N = c.N, D = c.D;
    const size_t rows = size_t(c.B) * c.H * N, count = rows * D;
    auto zeros = [](size_t n) { return std::vector<A>(n); };
    auto out = zeros(count), grad_q = out, grad_k = out, grad_v = out;
    auto lse = zeros(rows), cls = lse, entropy = lse, to_cls = lse, received = lse;
    auto value_norm = zeros(size_t(c.B) * N), grad_size = value_norm, grad_gate = zeros(size_t(c.H) * D);
    auto q = zeros(count), k = q, v = q, p = zeros(N), s = p, dp = p, ds = p;
    for (size_t r = 0; r < rows; r++)
      for (int d = 0; d < D; d++) {
        const double g = in.g(int(r / N % c.H), d);
        const size_t i = r * D + d;
        q[i] = A(gated(in.q[i], g, 0)), k[i] = A(gated(in.k[i], g, 1)), v[i] = A(gated(in.v[i], g, 2));
      }
    for (int b = 0; b < c.B; b++)
      for (int h = 0; h < c.H; h++) {
        const size_t head = in.at(b, h, 0);
        for (int i = 0; i < N; i++) {
          const A* qi = &q[head + i * D];
          const std::vector<A> gi(in.grad.begin() + head + i * D, in.grad.begin() + head + (i + 1) * D);
          A m = -INFINITY, sum = 0, moment = 0;
          for (int j = 0; j < N; j++) {
            A dot = 0;
            for (int d = 0; d < D; d++) dot += qi[d] * k[head + j * D + d];
            s[j] = A(result(dot * A(in.scale)));
            if (c.size) s[j] = A(result(s[j] + std::log(A(in.size[b * N + j]))));
            if (c.mask && !in.mask[b * N + j]) s[j] = -INFINITY;
            m = std::max(m, s[j]);
          }
          for (int j = 0; j < N; j++) {
            p[j] = m == -INFINITY ? A(0) : std::exp(s[j] - m);
            sum += p[j];
            if (p[j] > 0) moment += p[j] * (s[j] - m);
          }
          const size_t r = head / D + i;
          lse[r] = sum > 0 ? m + std::log(sum) : -INFINITY;
          if (sum > 0) entropy[r] = std::log(sum) - moment / sum;
          A delta = 0;
          for (int j = 0; j < N; j++) {
            if (sum > 0) p[j] = A(result(p[j] / sum));
            if (i == 0) cls[head / D + j] = p[j];
            if (j == 0) to_cls[r] = p[j];
            received[head / D + j] += p[j];
            A dot = 0;
            for (int d = 0; d < D; d++) {
              const size_t x = head + j * D + d;
              out[head + i * D + d] += p[j] * v[x];
              dot += gi[d] * v[x];
              grad_v[x] += p[j] * gi[d];
            }
            dp[j] = A(result(dot));
            delta += p[j] * dp[j];
          }
          for (int j = 0; j < N; j++) {
            ds[j] = A(result(p[j] * (dp[j] - delta)));
            grad_size[b * N + j] += ds[j] / in.size[b * N + j];
            for (int d = 0; d < D; d++) {
              grad_q[head + i * D + d] += ds[j] * A(in.scale) * k[head + j * D + d];
              grad_k[head + j * D + d] += ds[j] * A(in.scale) * qi[d];
            }
          }
        }
        for (int n = 0; n < N; n++)
          for (int d = 0; d < D; d++) {
            const size_t x = head + n * D + d;
            const A g = A(in.g(h, d));
            received[head / D + n] /= d ? 1 : N;
            value_norm[b * N + n] += v[x] * v[x];
            for (auto* t : {&grad_q, &grad_k, &grad_v}) (*t)[x] = A(result((*t)[x]));
            grad_gate[h * D + d] += grad_q[x] * A(in.q[x]) + grad_k[x] * A(in.k[x]) + grad_v[x] * A(in.v[x]);
            for (auto* t : {&grad_q, &grad_k, &grad_v}) (*t)[x] = A(result((*t)[x] * g));
            out[x] = A(result(out[x]));
          }
      }
    for (auto& x : value_norm) x = std::sqrt(x);
    if (c.gate == 1) {
      for (int h = 1; h < c.H; h++)
        for (int d = 0; d < D; d++) grad_gate[d] += grad_gate[h * D + d];
      grad_gate.resize(D);
    }
    auto wide = [](const std::vector<A>& x) { return std::vector<double>(x.begin(), x.end()); };
    return {wide(out), wide(lse), wide(cls), wide(entropy), wide(value_norm), wide(to_cls), wide(received),
            wide(grad_q), wide(grad_k), wide(grad_v), wide(grad_size), wide(grad_gate)};
  }
};

constexpr double kFloat = 1. / (1 << 24);  // one rounding to float32

static std::string name_of(const Case& c, const char* type, const char* what) {
  char text[200];
  snprintf(text, sizeof text, "%s B%d H%d N%d D%d%s%s gate%d%s scale %g %s", type, c.B, c.H, c.N, c.D, c.mask ? " mask" : "",
           c.size ? " size" : "", c.gate, c.packed ? "" : " separate", double(c.scale), what);
  return text;
}

// Largest error over finite entries, and the largest of those.
static std::pair<double, double> worst(const std::vector<double>& x, const std::vector<double>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); i++) {
    if (!std::isfinite(want[i])) continue;
    error = std::max(error, std::fabs(x[i] - want[i]));
    size = std::max(size, std::fabs(want[i]));
  }
  return {error, size};
}

// At most twice the error of `pytorch`, and some roundings of the result: by `eps` relative to the largest value, and of
// a float32 sum of terms around 1. NaN never passes.
template <class X>
static void compare(const Case& c, const char* type, const char* what, const std::vector<X>& got, const std::vector<double>& want,
                    const std::vector<double>& pytorch, double eps) {
  const auto [error, size] = worst(pytorch, want);
  const double limit = 2 * error + eps * size + 4 * kFloat * std::max(size, 1.);
  double most = -1;
  size_t where = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double g = double(float(got[i]));
    const double mine = g == want[i] ? 0 : std::isfinite(g) && std::isfinite(want[i]) ? std::fabs(g - want[i]) : INFINITY;
    if (mine > most) most = mine, where = i;
  }
  if (want.empty()) return;
  if (getenv("P3B_ERRORS")) printf("%s: %.2f of the limit %.2g\n", name_of(c, type, what).c_str(), most / limit, limit);
  check_close(name_of(c, type, what) + " [" + std::to_string(where) + "]", double(float(got[where])), want[where], limit);
}

template <class X>
static bool same_bits(const std::vector<X>& a, const std::vector<X>& b) {
  return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(X)));
}

template <class T>
struct Rounding;
template <>
struct Rounding<__nv_bfloat16> { static constexpr const char* name = "bfloat16"; static constexpr double eps = 1. / 256; };
template <>
struct Rounding<__half> { static constexpr const char* name = "float16"; static constexpr double eps = 1. / 2048; };
template <>
struct Rounding<float> { static constexpr const char* name = "float32"; static constexpr double eps = kFloat; };

template <class T>
static void run_case(const Case& c, unsigned seed) {
  Inputs r = Inputs::make<T>(c, seed);
  auto exact = [](double x) { return x; };
  auto rounded = [](double x) { return double(to_float(from_float<T>(float(x)))); };
  auto product = [](double x, double g, int) { return x * g; };
  auto rounded_product = [&](double x, double g, int) { return rounded(x * g); };
  const Results want = Results::solve<double>(r, product, exact), pytorch = Results::solve<float>(r, rounded_product, rounded);
  // Side outputs are float32, of operands whose one rounding is known: keys take both gates, squared. Of those operands
  // they must be right to what float32 does.
  auto operand = [&](double x, double g, int which) { return which == 0 ? x : which == 1 ? rounded(float(x) * (float(g) * float(g))) : x * g; };
  const Results side = Results::solve<double>(r, operand, exact), fine = Results::solve<float>(r, operand, exact);
  // Weights are recomputed from the stored log-sum-exp, here and in every fused kernel: 4 roundings of its largest value.
  const double through_lse = 4 * kFloat * worst(want.lse, want.lse).second;
  const size_t B = c.B, H = c.H, N = c.N, D = c.D, rows = B * H * N;
  const T nan = from_float<T>(NAN);

  std::vector<T> qkv(3 * rows * D), grad_out(rows * D), out(rows * D, nan), grad_qkv(3 * rows * D, nan);
  AttentionArguments base{};
  base.B = B, base.H = c.H, base.N = c.N, base.D = base.columns = c.D, base.scale = float(r.scale);
  const Strides packed{int64_t(N * 3 * H * D), int64_t(D), int64_t(3 * H * D)};
  const Strides separate{int64_t(H * N * D), int64_t(N * D), int64_t(D)};
  base.q_strides = base.k_strides = base.v_strides = c.packed ? packed : separate;
  base.q = qkv.data();
  base.k = qkv.data() + (c.packed ? H * D : rows * D);
  base.v = qkv.data() + (c.packed ? 2 * H * D : 2 * rows * D);
  const Strides& s = base.q_strides;
  for (size_t b = 0; b < B; b++)
    for (size_t h = 0; h < H; h++)
      for (size_t n = 0; n < N; n++)
        for (size_t d = 0; d < D; d++) {
          const size_t from = r.at(b, h, n, d), to = b * s.batch + h * s.head + n * s.row + d;
          const_cast<T*>(static_cast<const T*>(base.q))[to] = from_float<T>(r.q[from]);
          const_cast<T*>(static_cast<const T*>(base.k))[to] = from_float<T>(r.k[from]);
          const_cast<T*>(static_cast<const T*>(base.v))[to] = from_float<T>(r.v[from]);
          grad_out[((b * N + n) * H + h) * D + d] = from_float<T>(r.grad[from]);
        }
  base.key_mask = c.mask ? reinterpret_cast<const bool*>(r.mask.data()) : nullptr;
  base.token_size = c.size ? r.size.data() : nullptr;
  base.channel_gate = c.gate ? r.gate.data() : nullptr;
  base.gate_head = c.gate == 2 ? int64_t(D) : 0;

  auto heads_first = [&](const std::vector<T>& x, size_t tensors, size_t which) {
    std::vector<T> y(rows * D);
    for (size_t b = 0; b < B; b++)
      for (size_t h = 0; h < H; h++)
        for (size_t n = 0; n < N; n++)
          for (size_t d = 0; d < D; d++) y[r.at(b, h, n, d)] = x[(((b * N + n) * tensors + which) * H + h) * D + d];
    return y;
  };
  constexpr double eps = Rounding<T>::eps;
  const char* type = Rounding<T>::name;

  std::vector<float> lse(rows, NAN), cls(rows, NAN), entropy(rows, NAN), squares(rows, NAN), norm(B * N, NAN);
  ForwardArguments f{};
  static_cast<AttentionArguments&>(f) = base;
  f.out = out.data(), f.lse = lse.data(), f.cls_attention = cls.data(), f.entropy = entropy.data();
  f.value_squares = squares.data();
  check_true("forward launch", attention_forward<T>(f, nullptr) == cudaSuccess);
  attention_value_norm(squares.data(), norm.data(), B, c.H, c.N, nullptr);
  digest(out), digest(lse), digest(cls), digest(entropy), digest(norm);
  compare(c, type, "out", heads_first(out, 1, 0), want.out, pytorch.out, eps);
  compare(c, type, "lse", lse, side.lse, fine.lse, 0);
  compare(c, type, "cls_attention", cls, side.cls, fine.cls, 0);
  compare(c, type, "entropy", entropy, side.entropy, fine.entropy, 0);
  compare(c, type, "value_norm", norm, side.value_norm, fine.value_norm, 0);

  // From here on masked keys and their values hold NaN, which must reach nothing.
  for (size_t b = 0; b < B && c.mask; b++)
    for (size_t h = 0; h < H; h++)
      for (size_t n = 0; n < N; n++)
        for (size_t d = 0; d < D && !r.mask[b * N + n]; d++) {
          const size_t at = b * s.batch + h * s.head + n * s.row + d;
          const_cast<T*>(static_cast<const T*>(base.k))[at] = const_cast<T*>(static_cast<const T*>(base.v))[at] = nan;
        }

  // Without side outputs the output must be the same, bit for bit.
  std::vector<T> plain(rows * D, nan);
  ForwardArguments without = f;
  without.out = plain.data(), without.cls_attention = without.entropy = without.value_squares = nullptr;
  attention_forward<T>(without, nullptr);
  check_true(name_of(c, type, "side outputs change nothing"), same_bits(plain, out));

  std::vector<float> to_cls(rows, NAN), received(rows, NAN);
  ColumnArguments columns{};
  static_cast<AttentionArguments&>(columns) = base;
  columns.lse = lse.data(), columns.to_cls = to_cls.data(), columns.received = received.data();
  check_true("columns launch", attention_columns<T>(columns, nullptr) == cudaSuccess);
  digest(to_cls), digest(received);
  compare(c, type, "to_cls", to_cls, side.to_cls, fine.to_cls, through_lse);
  compare(c, type, "received", received, side.received, fine.received, through_lse);
  std::vector<float> alone(rows, NAN);
  columns.to_cls = alone.data(), columns.received = nullptr;
  attention_columns<T>(columns, nullptr);
  check_true(name_of(c, type, "to_cls alone"), same_bits(alone, to_cls));

  const size_t blocks = attention_key_blocks<T>(c.N, c.D);
  std::vector<float> delta(rows, NAN), size_partial(rows, NAN), gate_partial(B * H * blocks * D, NAN);
  std::vector<float> grad_size(B * N, NAN), grad_gate(c.gate == 2 ? H * D : D, NAN);
  BackwardArguments back{};
  static_cast<AttentionArguments&>(back) = base;
  back.grad_out = grad_out.data(), back.out = out.data(), back.lse = lse.data(), back.delta = delta.data();
  back.grad_qkv = grad_qkv.data();
  back.size_partial = c.size ? size_partial.data() : nullptr;
  back.gate_partial = c.gate ? gate_partial.data() : nullptr;
  back.key_blocks = int(blocks);
  check_true("backward launch", attention_backward<T>(back, nullptr) == cudaSuccess);
  digest(grad_qkv);
  compare(c, type, "grad_q", heads_first(grad_qkv, 3, 0), want.grad_q, pytorch.grad_q, eps + through_lse);
  compare(c, type, "grad_k", heads_first(grad_qkv, 3, 1), want.grad_k, pytorch.grad_k, eps + through_lse);
  compare(c, type, "grad_v", heads_first(grad_qkv, 3, 2), want.grad_v, pytorch.grad_v, eps + through_lse);
  if (c.size) {
    attention_size_grad(back, grad_size.data(), nullptr);
    digest(grad_size);
    compare(c, type, "grad_token_size", grad_size, want.grad_size, pytorch.grad_size, through_lse);
  }
  if (c.gate) {
    attention_gate_grad(back, grad_gate.data(), nullptr);
    digest(grad_gate);
    compare(c, type, "grad_channel_gate", grad_gate, want.grad_gate, pytorch.grad_gate, through_lse);
  }
}

template <class T>
static void run_all(bool small, bool medium) {
  const std::vector<Case> cases = {
      {1, 1, 1, 8, false, false, 0},          {2, 1, 17, 24, true, true, 1},
      {1, 2, 50, 64, true, true, 2},          {1, 1, 65, 40, false, true, 0, 16, false},
      {2, 1, 16, 64, true, false, 0, 1, true, true},
  };
  const std::vector<Case> longer = {
      {1, 1, 33, 128, true, true, 1},         {1, 1, 130, 96, true, false, 2},
      {1, 1, 197, 64, false, false, 0},       {1, 2, 197, 64, true, true, 2, 4},
      {1, 1, 330, 32, true, true, 1},         {1, 1, 66, 64, false, true, 0, 1000},
      {0, 2, 17, 16, true, true, 2},          {1, 1, 21, 72, true, true, 2, 1, false},
      {1, 1, 19, 120, false, true, 1},        {1, 1, 1, 104, true, true, 1, 1, true, true},
      {2, 1, 40, 64, true, true, 2, 1, true, true, -3}, {2, 1, 23, 32, true, true, 0, 1, true, true, 0},
      {2, 1, 71, 96, true, true, 1, 1, true, true, 1e-4f}, {1, 1, 25, 64, true, true, 0},
      {2, 1, 23, 64, true, true, 1, 1e-10f, true, true, 1e10f},
  };
  same_in_both_orders([&] {
    unsigned seed = 1;
    for (const Case& c : cases) run_case<T>(c, seed++);
  });
  unsigned seed = 9;
  for (const Case& c : longer)
    if (++seed; !small && !(medium && c.H * c.N > 200)) run_case<T>(c, seed);
}

int main(int argc, char** argv) {
  const std::string size = argc > 1 ? argv[1] : "";
  const bool small = size == "small";
  run_all<__nv_bfloat16>(small, !size.empty());
  run_all<__half>(!size.empty(), !size.empty());
  run_all<float>(!size.empty(), !size.empty());

  // The blocks that an H200 uses for many heads: several rounds of queries over resident keys.
  many_heads = 1;
  run_case<__nv_bfloat16>({1, 1, small ? 140 : 197, 32, true, true, 2}, 90);
  many_heads = 256;
  // Little shared memory: a ring of two stages forward, the streaming kernel backward.
  standin::shared_memory_limit = 21 << 10;
  same_in_both_orders([&] { run_case<__nv_bfloat16>({1, 1, small ? 150 : 200, 32, true, true, 1}, 91); });
  if (!small) run_case<__half>({2, 2, 150, 24, true, true, 2}, 92);
  // Of each width two blocks, warps beyond the end in the second.
  standin::shared_memory_limit = 38 << 10;
  if (!small) run_case<__nv_bfloat16>({1, 1, 130, 64, true, true, 2}, 93);
  standin::shared_memory_limit = 60 << 10;
  if (!small) run_case<__nv_bfloat16>({1, 1, 100, 80, true, true, 1}, 94);
  standin::shared_memory_limit = 73 << 10;
  if (!small) run_case<__nv_bfloat16>({1, 1, 100, 104, true, true, 2}, 95);
  return finish("attention_test");
}
