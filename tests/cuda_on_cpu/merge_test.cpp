// Matching (exact), merging, unmerging and their gradients against float64.
#include "merge.cu"

#include "testing.h"

using namespace p3b::cuda;

// The slots of p3b_ext/reference.py: match_tokens.
static std::vector<int> match(const std::vector<double>& x, const std::vector<char>* source, int N, int D, int P, int r) {
  std::vector<int> sources, destinations, slot(N);
  for (int n = P; n < N; n++) (source ? (*source)[n] != 0 : n % 2 == 0) ? sources.push_back(n) : destinations.push_back(n);
  std::vector<std::pair<double, int>> best;
  for (int s : sources) {
    std::pair<double, int> b{-INFINITY, 0};
    for (size_t t = 0; t < destinations.size(); t++) {
      double dot = 0;
      for (int d = 0; d < D; d++) dot += x[s * D + d] * x[destinations[t] * D + d];
      if (dot > b.first + 1e-9) b = {dot, int(t)};  // tied pairs of the test differ by rounding only
    }
    best.push_back(b);
  }
  std::vector<int> order(sources.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = int(i);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return best[i].first > best[j].first + 1e-9; });
  std::vector<char> merges(sources.size());
  for (int i = 0; i < r; i++) merges[order[i]] = 1;
  for (int n = 0; n < P; n++) slot[n] = n;
  int row = P;
  for (size_t i = 0; i < sources.size(); i++)
    if (!merges[i]) slot[sources[i]] = row++;
  for (size_t t = 0; t < destinations.size(); t++) slot[destinations[t]] = row + int(t);
  for (size_t i = 0; i < sources.size(); i++)
    if (merges[i]) slot[sources[i]] = row + best[i].second;
  return slot;
}

// The slots of an image that drops its r lowest scores, and whether p3b_ext/plan.py would.
static std::vector<int> prune(const std::vector<float>& scores, int N, int P, int r) {
  std::vector<int> order(N - P), slot(N, -1);
  for (int i = 0; i < N - P; i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return scores[i] > scores[j]; });
  for (int n = 0; n < P; n++) slot[n] = n;
  for (int i = 0; i < N - P - r; i++) slot[P + order[i]] = P + i;
  return slot;
}

struct Matching {
  int B, N, D, P, r;
  bool masked = false, ties = false;
  int H = 1, pad = 5;    // heads to average; elements between rows
  bool opposed = false;  // every similarity is negative
  int policy = 0;        // 1 variance, 2 over the squared mean; every other image is pruned. 3, 4: with a threshold for each
};

template <class T>
static void matches(const char* type, const Matching& m, unsigned seed) {
  const int B = m.B, N = m.N, D = m.D, P = m.P, r = m.r, S = N - P;
  Random random(seed);
  const int64_t row = D + m.pad, head = N * row, batch = m.H * head;
  std::vector<T> metric(B * batch);
  for (auto& v : metric) v = from_float<T>(random.normal());
  if (m.ties)  // tokens of three kinds only
    for (int i = 0; i < B * N; i++)
      for (int d = 0; d < D; d++) metric[i * row + d] = from_float<T>(i % 7 % 3 == d % 3 ? 1.f : 0.f);
  if (m.opposed)
    for (size_t i = 0; i < metric.size(); i++) metric[i] = from_float<T>(std::fabs(to_float(metric[i])) * (i / row % 2 ? -1.f : 1.f));
  std::vector<char> source(B * N);
  for (auto& s : source) s = random.below(3) == 0;
  if (m.masked)
    for (int b = 0; b < B; b++)
      for (int i = 0; i < r; i++) source[b * N + P + i] = 1;
  std::vector<float> scores(B * S), thresholds(B, 0.5f), rows(size_t(B) * N * D, NAN);
  for (int i = 0; i < B * S; i++) scores[i] = 1 + float(random.below(9)) * (i / S % 2 ? 1.f : 0.01f);  // image 1 spreads
  for (int b = 0; b < B && m.policy > 2; b++) {  // the other way round, and close to what decides
    double mean = 0, spread = 0;
    for (int i = 0; i < S; i++) mean += scores[b * S + i] / S;
    for (int i = 0; i < S; i++) spread += std::pow(scores[b * S + i] - mean, 2) / (S - 1);
    thresholds[b] = float((m.policy == 4 ? spread / (mean * mean) : spread) * (b % 2 ? 1.001 : 0.999));
  }
  std::vector<int> slot(B * N, -7);
  MatchArguments<T> a{};
  a.metric = metric.data(), a.batch = batch, a.head = head, a.row = row, a.H = m.H;
  a.source = m.masked ? reinterpret_cast<const bool*>(source.data()) : nullptr;
  a.scores = m.policy ? scores.data() : nullptr;
  a.thresholds = m.policy > 2 ? thresholds.data() : nullptr;
  a.threshold = m.policy == 2 ? 0.1f : 0.5f, a.relative = m.policy % 2 == 0;
  a.rows = rows.data(), a.slot = slot.data(), a.B = B, a.N = N, a.D = D, a.num_prefix = P, a.r = r;
  check_true("match launch", match_tokens(a, nullptr) == cudaSuccess);
  for (int b = 0; b < B; b++) {
    std::vector<double> x(N * D);
    for (int n = 0; n < N; n++) {
      double norm = 0;
      for (int d = 0; d < D; d++) {
        for (int h = 0; h < m.H; h++) x[n * D + d] += to_float(metric[b * batch + h * head + n * row + d]);
        x[n * D + d] = to_float(from_float<T>(float(x[n * D + d] / m.H)));
        norm += x[n * D + d] * x[n * D + d];
      }
      for (int d = 0; d < D; d++) x[n * D + d] /= std::max(std::sqrt(norm), 1e-12);
    }
    const std::vector<char> mask(source.begin() + b * N, source.begin() + (b + 1) * N);
    const bool pruned = m.policy && (m.policy > 2 ? b % 2 == 0 : b % 2 == 1);
    const auto want = pruned ? prune({scores.begin() + b * S, scores.begin() + (b + 1) * S}, N, P, r)
                             : match(x, m.masked ? &mask : nullptr, N, D, P, r);
    for (int n = 0; n < N; n++) check_close(type, " match", slot[b * N + n], want[n], 0);
  }
  digest(slot);
}

// weights: 0 none, 1 size, 2 weight, 3 both
template <class T>
static void merges(const char* type, int B, int N, int M, int C, int pad, int weights, bool normalize, double eps,
                   unsigned seed) {
  Random random(seed);
  const int64_t row = C + pad, batch = N * row;
  std::vector<T> x(B * batch), y(size_t(B) * M * C, from_float<T>(NAN)), grad_y(y.size()), grad_x(size_t(B) * N * C, from_float<T>(NAN));
  for (auto& v : x) v = from_float<T>(random.normal());
  for (auto& v : grad_y) v = from_float<T>(random.normal());
  std::vector<int> slot(B * N);
  for (int i = 0; i < B * N; i++) slot[i] = random.below(5) == 0 ? M / 2 : random.below(M + 2) - 1;
  for (auto& s : slot) s = s >= M - 1 && M > 1 ? -1 : s;  // the last row stays empty
  std::vector<float> size(B * N), weight(B * N), size_out(B * M, NAN), grad_out(B * M), grad_size(B * N, NAN), grad_weight(B * N, NAN);
  for (auto& v : size) v = float(1 + random.below(4));
  for (auto& v : weight) v = random.uniform(0.1f, 2.f);
  for (auto& v : grad_out) v = random.normal();
  const bool sized = weights & 1, weighted = weights & 2;
  const RowsIn<T> in{x.data(), batch, row};
  CombineArguments<T, int> a{in, slot.data(), sized ? size.data() : nullptr, weighted ? weight.data() : nullptr,
                             y.data(), size_out.data(), B, N, M, C, 0, normalize};
  check_true("merge launch", combine_rows(a, nullptr) == cudaSuccess);
  std::vector<T> unstaged_y(y.size(), from_float<T>(NAN));
  std::vector<float> unstaged_size(size_out.size(), NAN);
  CombineArguments<T, int> unstaged = a;
  unstaged.out = unstaged_y.data(), unstaged.size_out = unstaged_size.data();
  const int limit = standin::shared_memory_limit;
  standin::shared_memory_limit = N * 12 - 1;  // too little for what an image's tokens weigh
  check_true("merge launch without shared memory", combine_rows(unstaged, nullptr) == cudaSuccess);
  standin::shared_memory_limit = limit;
  check_true("merged without shared memory", !memcmp(unstaged_y.data(), y.data(), y.size() * sizeof(T)) &&
                                                 !memcmp(unstaged_size.data(), size_out.data(), size_out.size() * sizeof(float)));

  std::vector<double> want_y(y.size()), want_size(B * M), total(B * M);
  auto w = [&](int i) { return double(weighted ? weight[i] : sized ? size[i] : 1.f); };
  auto X = [&](int i, int c) { return double(to_float(x[i / N * batch + i % N * row + c])); };
  for (int i = 0; i < B * N; i++) {
    if (slot[i] < 0) continue;
    const int m = i / N * M + slot[i];
    want_size[m] += sized ? size[i] : 1;
    total[m] += w(i);
    for (int c = 0; c < C; c++) want_y[size_t(m) * C + c] += w(i) * X(i, c);
  }
  for (int m = 0; m < B * M; m++) {
    check_close(type, " size_out", size_out[m], want_size[m], 1e-5);
    for (int c = 0; c < C; c++) {
      double& want = want_y[size_t(m) * C + c];
      if (normalize && total[m] != 0) want /= total[m];
      check_close(type, " merged", to_float(y[size_t(m) * C + c]), want, eps * (1 + std::fabs(want)));
    }
  }

  MergeBackwardArguments<T> back{grad_y.data(), y.data(), sized ? grad_out.data() : nullptr, in, slot.data(),
                                 sized ? size.data() : nullptr, weighted ? weight.data() : nullptr, grad_x.data(),
                                 sized ? grad_size.data() : nullptr, weighted ? grad_weight.data() : nullptr,
                                 B, N, M, C, 0, normalize};
  check_true("merge backward launch", merge_backward(back, nullptr) == cudaSuccess);
  digest(y), digest(size_out), digest(grad_x), digest(grad_size), digest(grad_weight);
  for (int i = 0; i < B * N; i++) {
    const int m = slot[i] < 0 ? -1 : i / N * M + slot[i];
    const double divisor = m >= 0 && normalize && total[m] != 0 ? total[m] : 1;
    double dot = 0;
    for (int c = 0; c < C; c++) {
      const double g = m < 0 ? 0 : to_float(grad_y[size_t(m) * C + c]), want = w(i) * g / divisor;
      if (m >= 0) dot += g * (X(i, c) - (normalize && total[m] != 0 ? want_y[size_t(m) * C + c] : 0)) / divisor;
      check_close(type, " grad_x", to_float(grad_x[size_t(i) * C + c]), want, eps * (1 + std::fabs(want)));
    }
    const double of_size = sized && m >= 0 ? grad_out[m] : 0, slack = eps * std::sqrt(double(C)) * (4 + std::fabs(dot));
    if (weighted) check_close(type, " grad_weight", grad_weight[i], dot, slack);
    if (sized) check_close(type, " grad_size", grad_size[i], (weighted ? 0 : dot) + of_size, slack);
  }
}

// A row of one token is that token, whatever its weight, but where the mean is not a number or weighs nothing.
static void weights_of_one() {
  const float x[4] = {3, 5, 7, 11}, weight[4] = {NAN, INFINITY, 0, -2};
  const int slot[4] = {0, 1, 2, 3};
  float y[4] = {};
  CombineArguments<float, int> a{{x, 4, 1}, slot, nullptr, weight, y, nullptr, 1, 4, 4, 1, 0, true};
  check_true("weights of one launch", combine_rows(a, nullptr) == cudaSuccess);
  check_true("weights of one", std::isnan(y[0]) && std::isnan(y[1]) && y[2] == 0 && y[3] == 11);
}

// What launches refuse is what most_matched and most_in_backward say.
static void most() {
  const int limit = standin::shared_memory_limit;
  standin::shared_memory_limit = 18 << 10;
  const int matched = int(most_matched()), backward = int(most_in_backward());
  const std::vector<float> metric(backward + 1);
  std::vector<float> rows(backward + 1);
  std::vector<int> slot(backward + 1);
  for (int more = 0; more < 2; more++) {
    MatchArguments<float> a{};
    a.metric = metric.data(), a.row = 1, a.H = 1, a.rows = rows.data(), a.slot = slot.data(), a.B = 1, a.N = matched + more, a.D = 1;
    check_true("most tokens to match", (match_tokens(a, nullptr) == cudaSuccess) == !more);
    MergeBackwardArguments<float> back{};
    back.x = {metric.data(), 0, 0}, back.slot = slot.data(), back.B = 1, back.N = backward + more;
    check_true("most tokens of a gradient", (merge_backward(back, nullptr) == cudaSuccess) == !more);
  }
  standin::shared_memory_limit = limit;
}

template <class T>
static void all(const char* type, bool small, double eps) {
  unsigned seed = 1;
  matches<T>(type, {2, 17, 24, 1, 4}, seed++);
  matches<T>(type, {1, 50, 64, 2, 24}, seed++);
  matches<T>(type, {.B = 1, .N = 33, .D = 7, .P = 0, .r = 16, .ties = true}, seed++);
  matches<T>(type, {.B = 1, .N = 40, .D = 40, .P = 1, .r = 9, .masked = true, .pad = 8}, seed++);
  matches<T>(type, {1, 1, 8, 1, 0}, seed++);
  matches<T>(type, {.B = 1, .N = 20, .D = 8, .P = 2, .r = 5, .opposed = true}, seed++);
  matches<T>(type, {0, 9, 8, 1, 2}, seed++);
  matches<T>(type, {.B = 2, .N = 21, .D = 16, .P = 1, .r = 6, .H = 3, .pad = 0}, seed++);
  matches<T>(type, {.B = 2, .N = 19, .D = 13, .P = 1, .r = 9, .H = 5, .pad = 0, .policy = 1}, seed++);
  matches<T>(type, {.B = 2, .N = 24, .D = 32, .P = 2, .r = 7, .H = 6, .pad = 0, .policy = 2}, seed++);
  matches<T>(type, {.B = 2, .N = 23, .D = 8, .P = 1, .r = 7, .policy = 3}, seed++);
  matches<T>(type, {.B = 2, .N = 23, .D = 8, .P = 1, .r = 7, .policy = 4}, seed++);
  merges<T>(type, 2, 17, 13, 24, 0, 1, true, eps, seed++);
  merges<T>(type, 1, 9, 5, 7, 0, 3, true, eps, seed++);
  merges<T>(type, 1, 9, 5, 8, 3, 2, false, eps, seed++);
  merges<T>(type, 1, 40, 3, 16, 0, 0, true, eps, seed++);
  if (small) return;
  matches<T>(type, {2, 197, 64, 1, 16}, seed++);
  matches<T>(type, {.B = 1, .N = 300, .D = 40, .P = 1, .r = 149, .ties = true}, seed++);
  matches<T>(type, {.B = 3, .N = 197, .D = 64, .P = 1, .r = 50, .H = 6, .pad = 0, .policy = 3}, seed++);
  matches<T>(type, {.B = 1, .N = 70, .D = 300, .P = 1, .r = 20, .H = 2, .pad = 0}, seed++);
  merges<T>(type, 2, 197, 181, 384, 0, 1, true, eps, seed++);
  merges<T>(type, 1, 70, 50, 300, 0, 3, true, eps, seed++);
}

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  same_in_both_orders([&] { all<float>("float32", true, 1e-6); });
  most();
  weights_of_one();
  if (!small) all<float>("float32", small, 1e-6);
  all<__half>("float16", argc > 1, 1. / 1024);  // the longer cases once more only where nothing slows them down
  all<__nv_bfloat16>("bfloat16", argc > 1, 1. / 128);
  return finish("merge_test");
}
