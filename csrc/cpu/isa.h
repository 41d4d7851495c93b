// Which instruction set the CPU kernels use: chosen once at run time, forced by tests and by P3B_EXT_ISA.
#pragma once

#include <string>
#include <vector>

namespace p3b {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

Isa isa();                                 // the one in use
std::string isa_name();                    // "portable", "avx2", "avx512", "avx512_bf16"
std::vector<std::string> isa_available();  // runnable here, best last
void set_isa(const std::string& name);     // one of isa_available() or "auto"; throws std::invalid_argument

}  // namespace p3b
