// What this CPU can run, how the extension was built, and the one question that every call of a block asks. Independent
// of torch, so that it loads even where the kernels do not.

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

namespace py = pybind11;

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
  if (__builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C))
    features.push_back("f16c");
#endif
  return features;
}

// The variants that run on a CPU with these features, best first. One that needs a feature nobody knows here does not
// run.
Names isas_of(const Names& features) {
  Names isas;
  for (const auto& [isa, needed] : isa_features()) {
    const auto has = [&](const std::string& name) {
      return std::find(features.begin(), features.end(), name) != features.end();
    };
    if (std::all_of(needed.begin(), needed.end(), has)) isas.push_back(isa);
  }
  return isas;
}

// Up to Python 3.12 every change of a dictionary gives it a new number (PEP 509), so that one comparison tells that
// nothing in it changed.
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
uint64_t version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
constexpr bool kHasVersions = true;
#else
uint64_t version(PyObject*) { return 0; }
constexpr bool kHasVersions = false;
#endif

// A snapshot owns what it compares but for its root, which owns the snapshot: the root's dictionary is asked for each
// time, and stands as None in the list of dictionaries, each followed by its content.
PyObject* dict_at(PyObject* dicts, Py_ssize_t i, PyObject* root_dict) {
  PyObject* dict = PyTuple_GET_ITEM(dicts, i);
  return dict == Py_None ? root_dict : dict;
}

// The versions of the dictionaries as bytes; none where Python keeps no versions.
py::bytes versions(py::handle root, py::tuple dicts) {
  std::string bytes;
  const py::object root_dict = root.attr("__dict__");
  for (Py_ssize_t i = 0; kHasVersions && i < PyTuple_GET_SIZE(dicts.ptr()); i += 2) {
    const uint64_t found = version(dict_at(dicts.ptr(), i, root_dict.ptr()));
    bytes.append(reinterpret_cast<const char*>(&found), sizeof(found));
  }
  return bytes;
}

bool has_versions(PyObject* dicts, PyObject* root_dict, PyObject* expected) {
  const Py_ssize_t count = PyTuple_GET_SIZE(dicts) / 2;
  if (PyBytes_GET_SIZE(expected) != Py_ssize_t(count * sizeof(uint64_t)) || !kHasVersions) return false;
  const uint64_t* numbers = reinterpret_cast<const uint64_t*>(PyBytes_AS_STRING(expected));
  for (Py_ssize_t i = 0; i < count; ++i)
    if (version(dict_at(dicts, 2 * i, root_dict)) != numbers[i]) return false;
  return true;
}

// An expected value that is an Ellipsis may be anything: the owner of the snapshot.
bool has_contents(PyObject* dicts, PyObject* root_dict) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts); i += 2) {
    PyObject *dict = dict_at(dicts, i, root_dict), *items = PyTuple_GET_ITEM(dicts, i + 1), *key, *value;
    if (2 * PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(items)) return false;
    for (Py_ssize_t position = 0, k = 0; PyDict_Next(dict, &position, &key, &value); k += 2) {
      PyObject* expected = PyTuple_GET_ITEM(items, k + 1);
      if (PyTuple_GET_ITEM(items, k) != key || (expected != value && expected != Py_Ellipsis)) return false;
    }
  }
  return true;
}

// Whether `root` and the modules below it are as `snapshot` says; nn/guard.py makes it and has the same function in
// Python. It is asked at every call of a block, so it compares addresses and nothing else: no Python code runs.
bool unchanged(py::handle root, py::tuple snapshot) {
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(snapshot.ptr(), i); };
  PyObject *kind = part(0), *objects = part(1), *dicts = part(2), *empty = part(3), *methods = part(4);
  if (reinterpret_cast<PyObject*>(Py_TYPE(root.ptr())) != kind) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); i += 2)
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(objects, i))) != PyTuple_GET_ITEM(objects, i + 1))
      return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty); ++i)
    if (PyDict_GET_SIZE(PyTuple_GET_ITEM(empty, i)) != 0) return false;
  const py::object root_dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(root.ptr(), nullptr));
  if (!root_dict) throw py::error_already_set();
  if (!has_versions(dicts, root_dict.ptr(), part(5)) && !has_contents(dicts, root_dict.ptr())) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(methods); i += 3) {
    PyObject* found = PyObject_GetAttr(PyTuple_GET_ITEM(methods, i), PyTuple_GET_ITEM(methods, i + 1));
    if (found == nullptr) throw py::error_already_set();
    Py_DECREF(found);  // the class holds it
    if (found != PyTuple_GET_ITEM(methods, i + 2)) return false;
  }
  return true;
}

Names supported_isas() { return isas_of(cpu_features()); }

std::map<std::string, std::string> build_info() {
  return {{"compiler", MVIT3_COMPILER}, {"flags", MVIT3_FLAGS}, {"torch", MVIT3_TORCH}};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this CPU can run and how the extension was built.";
  m.def("supported_isas", &supported_isas, "Instruction sets of this CPU that a variant is built for, best first.");
  m.def(
      "isa_features", &isa_features, "The variants, best first, each with the CPU features that it was compiled for.");
  m.def("cpu_features", &cpu_features, "Those of the features that this CPU has.");
  m.def("isas_of", &isas_of, "Variants that run on a CPU with these features, best first.");
  m.def("detected_isa", [] { return supported_isas().front(); }, "The best of supported_isas().");
  m.def(
      "versions", &versions,
      "The version of every dictionary in a snapshot's second part, where Python keeps versions.");
  m.def("unchanged", &unchanged, "Whether a module and those below it are as a snapshot of nn/guard.py says.");
  m.def("build_info", &build_info, "Compiler, flags and torch version of the build.");
}
