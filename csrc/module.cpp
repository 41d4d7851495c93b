// The pybind11 module p3b_ext._C: what is not an op. Importing it registers the ops of library.cpp. It includes no torch header: the pybind11 that
// torch 2.11 bundles refuses to compile under TORCH_TARGET_VERSION.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"

#ifndef P3B_CUDA_ARCHS
#define P3B_CUDA_ARCHS ""
#endif

#define P3B_STRING_(x) #x
#define P3B_STRING(x) P3B_STRING_(x)

namespace {

std::map<std::string, std::string> compiled() {
  return {
      {"compiler", std::string(__VERSION__)},
      {"cxx_standard", std::to_string(__cplusplus)},
#ifdef USE_CUDA
      {"cuda", "yes"},
#else
      {"cuda", "no"},
#endif
      {"cuda_archs", P3B_CUDA_ARCHS},
      {"torch_target", P3B_STRING(TORCH_TARGET_VERSION)},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction sets of p3b_ext; importing it registers the ops.";
  m.def("compiled", &compiled, "How this extension was built.");
  m.def("isa_available", &p3b::isa_available, "Instruction sets that this build has code for and this machine can run, best last.");
  m.def("isa", &p3b::isa_name, "The instruction set that the kernels use now.");
  m.def("set_isa", &p3b::set_isa, pybind11::arg("name"), "Force an instruction set of isa_available(), or \"auto\"; for tests.");
}
