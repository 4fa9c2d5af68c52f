// What this CPU can run and how the extension was built. Independent of torch, so that it loads even where the kernels do not.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "build_info.h"

namespace {

// Best first; "generic" runs everywhere.
std::vector<std::string> supported_isas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back("avx512_bf16");
  if (avx512) isas.push_back("avx512");
  if (avx2) isas.push_back("avx2");
#endif
  isas.push_back("generic");
  return isas;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", MVIT3_COMPILER}, {"flags", MVIT3_FLAGS}, {"torch", MVIT3_TORCH}};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this CPU can run and how the extension was built.";
  m.def("supported_isas", &supported_isas, "Instruction sets of this CPU that a variant is built for, best first.");
  m.def("detected_isa", [] { return supported_isas().front(); }, "The best of supported_isas().");
  m.def("build_info", &build_info, "Compiler, flags and torch version of the build.");
}
