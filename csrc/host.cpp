// What this CPU can run and how the extension was built. Independent of torch, so that it loads even where the kernels do not.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "build_info.h"

namespace {

using Names = std::vector<std::string>;

// The variants, best first, and what the compiler may use in each: the flags -m<feature> of setup.py.
std::vector<std::pair<std::string, Names>> isa_features() { return MVIT3_ISAS; }

// What this CPU has, and the system lets a program use, of the features that a variant may need.
Names cpu_features() {
  Names features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define MVIT3_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.push_back(name);
  MVIT3_FEATURE("avx2")
  MVIT3_FEATURE("fma")
  MVIT3_FEATURE("bmi")
  MVIT3_FEATURE("bmi2")
  MVIT3_FEATURE("avx512f")
  MVIT3_FEATURE("avx512bw")
  MVIT3_FEATURE("avx512cd")
  MVIT3_FEATURE("avx512dq")
  MVIT3_FEATURE("avx512vl")
  MVIT3_FEATURE("avx512bf16")
#undef MVIT3_FEATURE
  unsigned eax, ebx, ecx, edx;  // older compilers do not know f16c by name
  if (__builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C)) features.push_back("f16c");
#endif
  return features;
}

// The variants that run on a CPU with these features, best first. One that needs a feature nobody knows here does not run.
Names isas_of(const Names& features) {
  Names isas;
  for (const auto& [isa, needed] : isa_features()) {
    const auto has = [&](const std::string& name) { return std::find(features.begin(), features.end(), name) != features.end(); };
    if (std::all_of(needed.begin(), needed.end(), has)) isas.push_back(isa);
  }
  return isas;
}

Names supported_isas() { return isas_of(cpu_features()); }

std::map<std::string, std::string> build_info() {
  return {{"compiler", MVIT3_COMPILER}, {"flags", MVIT3_FLAGS}, {"torch", MVIT3_TORCH}};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this CPU can run and how the extension was built.";
  m.def("supported_isas", &supported_isas, "Instruction sets of this CPU that a variant is built for, best first.");
  m.def("isa_features", &isa_features, "The variants, best first, each with the CPU features that it was compiled for.");
  m.def("cpu_features", &cpu_features, "Those of the features that this CPU has.");
  m.def("isas_of", &isas_of, "Variants that run on a CPU with these features, best first.");
  m.def("detected_isa", [] { return supported_isas().front(); }, "The best of supported_isas().");
  m.def("build_info", &build_info, "Compiler, flags and torch version of the build.");
}
