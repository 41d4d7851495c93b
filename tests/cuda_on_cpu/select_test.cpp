// Ranking and gathering against a stable sort. All results are exact.
#include "select.cu"

#include "testing.h"

using namespace p3b::cuda;

template <class T>
static void ranks(const char* type, int B, int S, int P, int keep, bool by_score, unsigned seed) {
  Random random(seed);
  const int64_t stride = S + 3;  // rows of a wider tensor
  std::vector<T> scores(B * stride, from_float<T>(1e3f));
  for (int b = 0; b < B; b++)
    for (int i = 0; i < S; i++) {
      float x = float(random.below(2 * S)) / S - 1;  // many ties, both signs
      if (random.below(12) == 0) x = random.below(2) ? NAN : -INFINITY;
      if (random.below(12) == 0) x = random.below(2) ? 0.f : -0.f;
      scores[b * stride + i] = from_float<T>(x);
    }
  std::vector<int64_t> index(B * (P + keep), -7);
  std::vector<int> slot(B * (P + S), -7);
  check_true("rank launch", rank_tokens<T>(scores.data(), stride, B, S, P, keep, by_score, index.data(), nullptr,
                                           nullptr) == cudaSuccess);
  check_true("rank launch", rank_tokens<T>(scores.data(), stride, B, S, P, keep, by_score, nullptr, slot.data(),
                                           nullptr) == cudaSuccess);
  digest(index), digest(slot);
  for (int b = 0; b < B; b++) {
    std::vector<int> order(S);
    for (int i = 0; i < S; i++) order[i] = i;
    auto value = [&](int i) {
      const float x = to_float(scores[b * stride + i]);
      return std::make_pair(x == x ? 1 : 0, x == x ? x : 0.f);
    };
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return value(i) > value(j); });
    order.resize(keep);
    if (!by_score) std::sort(order.begin(), order.end());
    std::vector<int> want(P + S, -1);
    for (int i = 0; i < P; i++) want[i] = i;
    for (int i = 0; i < keep; i++) want[P + order[i]] = P + i;
    for (int i = 0; i < P + keep; i++)
      check_close(type, " index", double(index[b * (P + keep) + i]), i < P ? i : P + order[i - P], 0);
    for (int i = 0; i < P + S; i++) check_close(type, " slot", slot[b * (P + S) + i], want[i], 0);
  }
}

// Scores from attention and value norms, ranks, and moves rows, in one launch.
template <class T>
static void keeps(const char* type, int B, int H, int S, int P, int keep, int C, int pad, bool by_score, bool factor, unsigned seed) {
  Random random(seed);
  const int N = P + S, M = P + keep;
  const int64_t row = C + pad, batch = N * row;
  std::vector<float> attention(size_t(B) * H * N), norm(size_t(B) * N);
  for (auto& v : attention) v = float(random.below(9)) / 8;  // ties
  for (auto& v : norm) v = float(1 + random.below(3));
  if (S) attention[P + S / 2] = NAN;
  std::vector<T> x(B * batch), y(size_t(B) * M * C, from_float<T>(NAN));
  for (auto& v : x) v = from_float<T>(random.normal());
  std::vector<int64_t> index(B * M, -7);
  RankArguments<float, T> a{};
  a.scores = {attention.data() + P, int64_t(H) * N, N, H, factor ? norm.data() + P : nullptr, N};
  a.index = index.data(), a.x = {x.data(), batch, row}, a.y = y.data();
  a.B = B, a.num_scores = S, a.P = P, a.keep = keep, a.C = C, a.by_score = by_score;
  check_true("keep launch", keep_tokens(a, nullptr) == cudaSuccess);
  digest(index), digest(y);
  for (int b = 0; b < B; b++) {
    std::vector<float> score(S);
    std::vector<int> order(S);
    for (int i = 0; i < S; i++) {
      order[i] = i;
      for (int h = 0; h < H; h++) score[i] += attention[(size_t(b) * H + h) * N + P + i];
      score[i] = score[i] / H * (factor ? norm[b * N + P + i] : 1.f);
    }
    auto value = [&](int i) { return std::make_pair(score[i] == score[i], score[i] == score[i] ? score[i] : 0.f); };
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return value(i) > value(j); });
    order.resize(keep);
    if (!by_score) std::sort(order.begin(), order.end());
    for (int m = 0; m < M; m++) {
      const int n = m < P ? m : P + order[m - P];
      check_close(type, " kept position", double(index[b * M + m]), n, 0);
      for (int c = 0; c < C; c++)
        check_close(type, " kept row", to_float(y[(size_t(b) * M + m) * C + c]), to_float(x[b * batch + n * row + c]), 0);
    }
  }
}

template <class T>
static void gathers(const char* type, int B, int N, int M, int C, int pad, unsigned seed) {
  Random random(seed);
  const int64_t row = C + pad, batch = M * row;
  std::vector<T> y(B * batch), out(size_t(B) * N * C, from_float<T>(NAN));
  for (auto& v : y) v = from_float<T>(random.normal());
  std::vector<int> slot(B * N);
  std::vector<int64_t> index(B * N);
  for (int i = 0; i < B * N; i++) index[i] = slot[i] = random.below(M + 1) - 1;
  const RowsIn<T> in{y.data(), batch, row};
  auto compare = [&](const char* what) {
    for (int i = 0; i < B * N; i++)
      for (int c = 0; c < C; c++)
        check_close(type, what, to_float(out[size_t(i) * C + c]),
                    slot[i] < 0 ? 0.5 : to_float(y[i / N * batch + slot[i] * row + c]), 0);
  };
  check_true("gather launch", gather_rows(in, slot.data(), out.data(), B, N, M, C, 0.5f, nullptr) == cudaSuccess);
  compare(" gather by slot");
  std::fill(out.begin(), out.end(), from_float<T>(NAN));
  check_true("gather launch", gather_rows(in, index.data(), out.data(), B, N, M, C, 0.5f, nullptr) == cudaSuccess);
  compare(" gather by index");
}

// The gradient of select_tokens: rows that one token received add up. Sums of eighths are exact, so results are too.
template <class T>
static void scatters(const char* type, int B, int rows, int N, int C, int pad, unsigned seed) {
  Random random(seed);
  const int64_t row = C + pad, batch = rows * row;
  std::vector<T> grad(B * batch), out(size_t(B) * N * C, from_float<T>(NAN)), unstaged = out;
  for (auto& v : grad) v = from_float<T>(float(random.below(33) - 16) / 8);
  std::vector<int64_t> index(size_t(B) * rows);
  for (auto& i : index) i = random.below(N + 1) - 1;  // -1: no token
  CombineArguments<T, int64_t> a{};
  a.x = {grad.data(), batch, row}, a.slot = index.data(), a.out = out.data();
  a.B = B, a.N = rows, a.M = N, a.C = C;
  check_true("scatter launch", combine_rows(a, nullptr) == cudaSuccess);
  std::vector<double> want(out.size());
  for (int i = 0; i < B * rows; i++)
    for (int c = 0; c < C && index[i] >= 0; c++)
      want[(size_t(i / rows) * N + index[i]) * C + c] += to_float(grad[i / rows * batch + i % rows * row + c]);
  for (size_t i = 0; i < out.size(); i++) check_close(type, " scattered", to_float(out[i]), to_float(from_float<T>(float(want[i]))), 0);

  const int limit = standin::shared_memory_limit;
  standin::shared_memory_limit = rows * 12 - 1;  // too little for the index of an image
  a.out = unstaged.data();
  check_true("scatter launch without shared memory", combine_rows(a, nullptr) == cudaSuccess);
  standin::shared_memory_limit = limit;
  digest(out), digest(unstaged);
  check_true("scattered without shared memory", !memcmp(out.data(), unstaged.data(), out.size() * sizeof(T)));
}

// What a launch refuses is what most_ranked says.
static void most() {
  const int limit = standin::shared_memory_limit;
  standin::shared_memory_limit = 1 << 10;
  const int count = int(most_ranked());
  const std::vector<float> scores(count + 1);
  std::vector<int> slot(count + 1);
  for (int more = 0; more < 2; more++)
    check_true("most tokens", (rank_tokens<float>(scores.data(), 0, 1, count + more, 0, 1, false, nullptr, slot.data(),
                                                  nullptr) == cudaSuccess) == !more);
  standin::shared_memory_limit = limit;
}

template <class T>
static void all(const char* type, bool small) {
  unsigned seed = 1;
  for (bool by_score : {false, true}) {
    ranks<T>(type, 2, 49, 1, 30, by_score, seed++);
    ranks<T>(type, 1, 7, 0, 0, by_score, seed++);
    ranks<T>(type, 1, 33, 2, 33, by_score, seed++);
    ranks<T>(type, 1, 0, 1, 0, by_score, seed++);
    ranks<T>(type, 0, 5, 1, 2, by_score, seed++);
    ranks<T>(type, 1, 1, 0, 1, by_score, seed++);
    keeps<T>(type, 2, 3, 49, 1, 34, 24, 0, by_score, true, seed++);
    keeps<T>(type, 1, 1, 35, 6, 20, 7, 2, by_score, false, seed++);
    keeps<T>(type, 1, 2, 1, 0, 0, 8, 0, by_score, false, seed++);
    keeps<T>(type, 1, 2, 0, 2, 0, 16, 8, by_score, true, seed++);
    if (small) continue;
    ranks<T>(type, 2, 196, 1, 138, by_score, seed++);
    ranks<T>(type, 1, 300, 1, 150, by_score, seed++);
    keeps<T>(type, 2, 6, 196, 1, 138, 384, 0, by_score, true, seed++);
  }
  gathers<T>(type, 2, 17, 12, 24, 0, seed++);
  gathers<T>(type, 1, 5, 9, 7, 0, seed++);
  gathers<T>(type, 2, 3, 4, 8, 1, seed++);
  scatters<T>(type, 2, 40, 17, 24, 0, seed++);
  scatters<T>(type, 1, 9, 5, 7, 2, seed++);
  if (small) return;
  gathers<T>(type, 2, 50, 70, 384, 8, seed++);
  scatters<T>(type, 2, 138, 197, 384, 8, seed++);
}

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  same_in_both_orders([&] { all<float>("float32", true); });
  most();
  if (!small) all<float>("float32", small);
  if (!small && argc == 1) {  // the longest images, once
    ranks<float>("float32", 1, 4095, 1, 2000, false, 98);
    keeps<float>("float32", 1, 1, 4096, 0, 3000, 8, 8, true, false, 99);
    scatters<float>("float32", 1, 20000, 5, 3, 0, 100);  // more than shared memory holds
  }
  all<__half>("float16", argc > 1);  // the longer cases once more only where nothing slows them down
  all<__nv_bfloat16>("bfloat16", argc > 1);
  return finish("select_test");
}
