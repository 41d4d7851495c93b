// What the standalone tests share: a seeded generator, comparisons that count, a verdict.
#pragma once
#include "cuda_on_cpu.h"

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

// What same_in_both_orders compares: every bit of every result, in the order in which tests hand them over.
inline uint64_t digested = 0;
template <class X>
inline void digest(const std::vector<X>& x) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(x.data());
  for (size_t i = 0; i < x.size() * sizeof(X); i++) digested = (digested ^ bytes[i]) * 0x100000001b3;
}

// Runs f with blocks and threads in rising, then in falling order: no result may depend on it. Sanitizers see one order.
template <class F>
inline void same_in_both_orders(F f) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return f();
#endif
  digested = 0;
  f();
  const uint64_t rising = digested;
  digested = 0;
  standin::falling_order = true;
  f();
  standin::falling_order = false;
  check_true("results do not depend on the order of threads and blocks", digested == rising);
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
