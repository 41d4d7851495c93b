// What the standalone tests share: a seeded generator, comparisons that count, a verdict.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

inline long checks = 0, failures = 0;

inline void check_true(const std::string& what, bool ok) {
  checks++;
  if (!ok && failures++ < 20) fprintf(stderr, "FAILED %s\n", what.c_str());
}

// NaN never passes; infinities must be equal.
inline void check_close(const std::string& what, double got, double want, double tolerance) {
  checks++;
  if (got == want || std::fabs(got - want) <= tolerance) return;
  if (failures++ < 20) fprintf(stderr, "FAILED %s: got %.9g, want %.9g, tolerance %.2g\n", what.c_str(), got, want, tolerance);
}

// The same for inner loops: the name is put together only where it is needed.
inline void check_close(const char* type, const char* what, double got, double want, double tolerance) {
  if (got == want || std::fabs(got - want) <= tolerance) checks++;
  else check_close(std::string(type) + what, got, want, tolerance);
}

inline int finish(const char* name) {
  printf("%s: %ld checks, %ld failed\n", name, checks, failures);
  return failures != 0;
}

struct Random {
  std::mt19937 engine;
  explicit Random(unsigned seed) : engine(seed) {}
  float normal() { return std::normal_distribution<float>()(engine); }
  float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine); }
  int below(int n) { return int(engine() % unsigned(n)); }
};
