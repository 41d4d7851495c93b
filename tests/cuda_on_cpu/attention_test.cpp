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
};

// Inputs rounded to T, kept as double, and everything that follows from them in float64.
struct Reference {
  Case c;
  double scale;
  std::vector<double> q, k, v, grad;  // [B, H, N, D]
  std::vector<float> gate, size;
  std::vector<char> mask;
  std::vector<double> out, lse, cls, entropy, value_norm, to_cls, received;
  std::vector<double> grad_q, grad_k, grad_v, grad_size, grad_gate;

  size_t at(int b, int h, int n, int d = 0) const { return ((size_t(b) * c.H + h) * c.N + n) * c.D + d; }
  double g(int h, int d) const { return c.gate == 0 ? 1 : gate[c.gate == 1 ? d : h * c.D + d]; }

  template <class T>
  void fill(unsigned seed) {
    Random random(seed);
    scale = 1 / std::sqrt(double(c.D));
    for (auto* x : {&q, &k, &v, &grad}) {
      x->resize(size_t(c.B) * c.H * c.N * c.D);
      for (auto& y : *x) y = to_float(from_float<T>(random.normal() * (x == &q ? c.logits : 1.f)));
    }
    gate.resize(size_t(c.H) * c.D);
    for (auto& x : gate) x = random.below(8) ? random.uniform(0.5f, 1.5f) : 0.f;
    size.resize(size_t(c.B) * c.N);
    for (auto& x : size) x = float(1 + random.below(5));
    mask.resize(size_t(c.B) * c.N);
    for (auto& x : mask) x = random.below(4) != 0;
    if (c.dead) std::fill(mask.begin(), mask.begin() + c.N, 0);
    solve();
  }

  void solve() {
    const int N = c.N, D = c.D;
    const size_t rows = size_t(c.B) * c.H * N, count = rows * D;
    out.assign(count, 0), grad_q.assign(count, 0), grad_k.assign(count, 0), grad_v.assign(count, 0);
    for (auto* x : {&lse, &cls, &entropy, &to_cls, &received}) x->assign(rows, 0);
    value_norm.assign(size_t(c.B) * N, 0);
    grad_size.assign(size_t(c.B) * N, 0);
    grad_gate.assign(size_t(c.H) * D, 0);
    std::vector<double> p(N), s(N), ds(N);
    for (int b = 0; b < c.B; b++)
      for (int h = 0; h < c.H; h++) {
        for (int i = 0; i < N; i++) {
          double m = -INFINITY, sum = 0;
          for (int j = 0; j < N; j++) {
            s[j] = 0;
            for (int d = 0; d < D; d++) s[j] += q[at(b, h, i, d)] * k[at(b, h, j, d)] * g(h, d) * g(h, d) * scale;
            if (c.size) s[j] += std::log(double(size[b * N + j]));
            if (c.mask && !mask[b * N + j]) s[j] = -INFINITY;
            m = std::max(m, s[j]);
          }
          for (int j = 0; j < N; j++) sum += m == -INFINITY ? 0 : std::exp(s[j] - m);
          const size_t r = at(b, h, i) / D;
          lse[r] = sum > 0 ? m + std::log(sum) : -INFINITY;
          double delta = 0;
          for (int j = 0; j < N; j++) {
            p[j] = sum > 0 ? std::exp(s[j] - lse[r]) : 0;
            if (p[j] > 0) entropy[r] -= p[j] * (s[j] - lse[r]);
            if (i == 0) cls[at(b, h, j) / D] = p[j];
            if (j == 0) to_cls[r] = p[j];
            received[at(b, h, j) / D] += p[j] / N;
            ds[j] = 0;
            for (int d = 0; d < D; d++) {
              out[at(b, h, i, d)] += p[j] * v[at(b, h, j, d)] * g(h, d);
              ds[j] += grad[at(b, h, i, d)] * v[at(b, h, j, d)] * g(h, d);
              grad_v[at(b, h, j, d)] += p[j] * grad[at(b, h, i, d)] * g(h, d);
              grad_gate[h * D + d] += p[j] * grad[at(b, h, i, d)] * v[at(b, h, j, d)];
            }
            delta += p[j] * ds[j];
          }
          for (int j = 0; j < N; j++) {
            ds[j] = p[j] * (ds[j] - delta);
            grad_size[b * N + j] += ds[j] / size[b * N + j];
            for (int d = 0; d < D; d++) {
              const double g1 = g(h, d), x = ds[j] * scale;
              grad_q[at(b, h, i, d)] += x * g1 * g1 * k[at(b, h, j, d)];
              grad_k[at(b, h, j, d)] += x * g1 * g1 * q[at(b, h, i, d)];
              grad_gate[h * D + d] += 2 * x * g1 * q[at(b, h, i, d)] * k[at(b, h, j, d)];
            }
          }
        }
        for (int n = 0; n < N; n++)
          for (int d = 0; d < D; d++) value_norm[b * N + n] += std::pow(v[at(b, h, n, d)] * g(h, d), 2);
      }
    for (auto& x : value_norm) x = std::sqrt(x);
    if (c.gate == 1)
      for (int h = 1; h < c.H; h++)
        for (int d = 0; d < D; d++) grad_gate[d] += grad_gate[h * D + d];
  }
};

static std::string name_of(const Case& c, const char* type, const char* what) {
  char text[200];
  snprintf(text, sizeof text, "%s B%d H%d N%d D%d%s%s gate%d%s %s", type, c.B, c.H, c.N, c.D, c.mask ? " mask" : "",
           c.size ? " size" : "", c.gate, c.packed ? "" : " separate", what);
  return text;
}

template <class X>
static void compare(const Case& c, const char* type, const char* what, const std::vector<X>& got,
                    const std::vector<double>& want, double tolerance) {
  double worst = 0, size = 0;
  size_t where = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double g = double(float(got[i]));
    const double error = g == want[i] ? 0 : std::isfinite(g) ? std::fabs(g - want[i]) : INFINITY;
    if (std::isfinite(want[i])) size = std::max(size, std::fabs(want[i]));
    if (error > worst) worst = error, where = i;
  }
  const std::string name = name_of(c, type, what) + " [" + std::to_string(where) + "]";
  check_close(name, got.empty() ? 0 : double(float(got[where])), want.empty() ? 0 : want[where], tolerance * (1 + size));
}

template <class T>
struct Rounding;
template <>
struct Rounding<__nv_bfloat16> { static constexpr const char* name = "bfloat16"; static constexpr double eps = 1. / 256; };
template <>
struct Rounding<__half> { static constexpr const char* name = "float16"; static constexpr double eps = 1. / 2048; };
template <>
struct Rounding<float> { static constexpr const char* name = "float32"; static constexpr double eps = 2e-7; };

template <class T>
static void run_case(const Case& c, unsigned seed) {
  Reference r{};
  r.c = c;
  r.fill<T>(seed);
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
  if (c.gate == 1) r.gate.resize(D);
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
  // Gated keys are rounded once more, so statistics of gated logits carry the dtype's error.
  // In float32 the rounding of the logits shows instead, which grows with them.
  const double eps = Rounding<T>::eps * (std::is_same_v<T, float> ? c.logits : 1), fine = c.gate ? 2 * eps * c.logits : 2e-6 * c.logits;
  const char* type = Rounding<T>::name;

  std::vector<float> lse(rows, NAN), cls(rows, NAN), entropy(rows, NAN), squares(rows, NAN), norm(B * N, NAN);
  ForwardArguments f{};
  static_cast<AttentionArguments&>(f) = base;
  f.out = out.data(), f.lse = lse.data(), f.cls_attention = cls.data(), f.entropy = entropy.data();
  f.value_squares = squares.data();
  check_true("forward launch", attention_forward<T>(f, nullptr) == cudaSuccess);
  attention_value_norm(squares.data(), norm.data(), B, c.H, c.N, nullptr);
  compare(c, type, "out", heads_first(out, 1, 0), r.out, 2 * eps);
  compare(c, type, "lse", lse, r.lse, fine);
  compare(c, type, "cls_attention", cls, r.cls, fine);
  compare(c, type, "entropy", entropy, r.entropy, 2 * fine);
  compare(c, type, "value_norm", norm, r.value_norm, 2e-6);

  // Without side outputs the output must be the same, bit for bit.
  std::vector<T> plain(rows * D, nan);
  ForwardArguments without = f;
  without.out = plain.data(), without.cls_attention = without.entropy = without.value_squares = nullptr;
  attention_forward<T>(without, nullptr);
  check_true(name_of(c, type, "side outputs change nothing"), !memcmp(plain.data(), out.data(), rows * D * sizeof(T)));

  std::vector<float> to_cls(rows, NAN), received(rows, NAN);
  ColumnArguments columns{};
  static_cast<AttentionArguments&>(columns) = base;
  columns.lse = lse.data(), columns.to_cls = to_cls.data(), columns.received = received.data();
  check_true("columns launch", attention_columns<T>(columns, nullptr) == cudaSuccess);
  compare(c, type, "to_cls", to_cls, r.to_cls, 2 * fine);
  compare(c, type, "received", received, r.received, 2 * fine);
  std::vector<float> alone(rows, NAN);
  columns.to_cls = alone.data(), columns.received = nullptr;
  attention_columns<T>(columns, nullptr);
  check_true(name_of(c, type, "to_cls alone"), !memcmp(alone.data(), to_cls.data(), rows * sizeof(float)));

  const double loose = (c.logits > 100 || c.gate ? 6 : 3) * eps;
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
  compare(c, type, "grad_q", heads_first(grad_qkv, 3, 0), r.grad_q, loose);
  compare(c, type, "grad_k", heads_first(grad_qkv, 3, 1), r.grad_k, loose);
  compare(c, type, "grad_v", heads_first(grad_qkv, 3, 2), r.grad_v, loose);
  if (c.size) {
    attention_size_grad(back, grad_size.data(), nullptr);
    compare(c, type, "grad_token_size", grad_size, r.grad_size, loose);
  }
  if (c.gate) {
    attention_gate_grad(back, grad_gate.data(), nullptr);
    r.grad_gate.resize(grad_gate.size());
    compare(c, type, "grad_channel_gate", grad_gate, r.grad_gate, loose);
  }
}

template <class T>
static void run_all(bool small) {
  unsigned seed = 1;
  const std::vector<Case> cases = {
      {1, 1, 1, 8, false, false, 0},          {2, 1, 17, 24, true, true, 1},
      {1, 2, 50, 64, true, true, 2},          {1, 1, 65, 40, false, true, 0, 1, false},
      {2, 1, 16, 64, true, false, 0, 1, true, true},
  };
  const std::vector<Case> longer = {
      {1, 1, 33, 128, true, true, 1},         {1, 1, 130, 96, true, false, 2},
      {1, 1, 197, 64, false, false, 0},       {1, 2, 197, 64, true, true, 2, 4},
      {1, 1, 330, 32, true, true, 1},         {1, 1, 66, 64, false, true, 0, 1000},
  };
  for (const Case& c : cases) run_case<T>(c, seed++);
  if (small) return;
  for (const Case& c : longer) run_case<T>(c, seed++);
}

int main(int argc, char** argv) {
  const std::string size = argc > 1 ? argv[1] : "";
  const bool small = size == "small";
  run_all<__nv_bfloat16>(small);
  run_all<__half>(!size.empty());
  run_all<float>(!size.empty());

  // The blocks that an H200 uses for many heads: several rounds of queries over resident keys.
  many_heads = 1;
  run_case<__nv_bfloat16>({1, 1, small ? 140 : 197, 32, true, true, 2}, 90);
  many_heads = 256;
  // Little shared memory: a ring of two stages forward, the streaming kernel backward.
  standin::shared_memory_limit = 18 << 10;
  run_case<__nv_bfloat16>({1, 1, small ? 135 : 200, 32, true, true, 1}, 91);
  if (!small) run_case<__half>({2, 2, 150, 24, true, true, 2}, 92);
  return finish("attention_test");
}
