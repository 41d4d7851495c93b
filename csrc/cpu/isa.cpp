#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace p3b {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();  // checks the operating system's support too (XGETBV)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

int parse(const std::string& name) {
  if (name == "auto") return static_cast<int>(best());
  for (int i = 0; i <= static_cast<int>(best()); i++)
    if (name == kNames[i]) return i;
  std::string known = "auto";
  for (const auto& n : isa_available()) known += ", " + n;
  throw std::invalid_argument("set_isa: name must be one of " + known + " on this machine, got " + name);
}

std::atomic<int>& current() {
  static std::atomic<int> value{[] {
    const char* forced = std::getenv("P3B_EXT_ISA");
    return forced && *forced ? parse(forced) : static_cast<int>(best());
  }()};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }
std::string isa_name() { return kNames[static_cast<int>(isa())]; }
std::vector<std::string> isa_available() { return {kNames, kNames + static_cast<int>(best()) + 1}; }
void set_isa(const std::string& name) { current().store(parse(name), std::memory_order_relaxed); }

}  // namespace p3b
