// What this CPU can run, how the extension was built, and the two questions asked most often: whether a block is as it
// was, and whether a Triton kernel was launched with such arguments before. Independent of torch, so that it loads even
// where the kernels do not, and within Python's limited API, so that one file serves every Python from 3.10 on.

#undef Py_LIMITED_API  // torch's build sets it too
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
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
// nothing in it changed. The limited API has no name for it, but the layout of these versions is what it is for ever;
// a build of them with another layout (Py_TRACE_REFS) is found out when the module is loaded.
struct Dict {
  Py_ssize_t references;
  void* type;
  Py_ssize_t used;
  uint64_t version;
};

const Dict& layout_of(PyObject* dict) { return *reinterpret_cast<const Dict*>(dict); }

bool has_versions = false;  // set once, when the module is loaded

bool find_versions() {
  PyObject* hex = PySys_GetObject("hexversion");  // borrowed
  const unsigned long running = hex ? PyLong_AsUnsignedLong(hex) : 0;
  if (sizeof(void*) != 8 || running < 0x030A0000 || running >= 0x030D0000) return false;
  PyObject *dict = PyDict_New(), *key = PyLong_FromLong(1);
  bool found = dict != nullptr && key != nullptr && layout_of(dict).type == Py_TYPE(dict);
  for (PyObject* value : {Py_True, Py_False, Py_True}) {
    if (!found) break;
    const uint64_t before = layout_of(dict).version;
    found = PyDict_SetItem(dict, key, value) == 0 && layout_of(dict).used == PyDict_Size(dict) &&
            layout_of(dict).version != before;
  }
  Py_XDECREF(key);
  Py_XDECREF(dict);
  return found;
}

Py_ssize_t size_of(PyObject* dict) { return has_versions ? layout_of(dict).used : PyDict_Size(dict); }

// A snapshot of nn/guard.py packed for `unchanged`: addresses of what its tuples own.
//   how many objects, empty dictionaries, methods and dictionaries; whether versions count
//   objects: each with its class.  empty dictionaries.  methods: owner, name, function
//   dictionaries: address (0: that of the root), version, where its contents begin
//   contents, which are read only where a version differs: number of entries, keys each with its value (0: any)
using Word = uintptr_t;
static_assert(sizeof(Word) >= sizeof(void*));
enum { kObjects, kEmpty, kMethods, kDicts, kVersions, kHeader };

Word word(PyObject* object) { return reinterpret_cast<Word>(object); }
PyObject* object(Word word) { return reinterpret_cast<PyObject*>(word); }

void append(std::vector<Word>& words, PyObject* tuple) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) words.push_back(word(PyTuple_GetItem(tuple, i)));
}

// pack(root, (objects, dicts, empty, methods)), as parts of a snapshot are called: its last part. The snapshot owns
// what it compares but for its root, which owns the snapshot: the root's dictionary stands in it as None, and an
// Ellipsis for what may be anything.
PyObject* pack(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[1]) || PyTuple_Size(arguments[1]) != 4)
    return PyErr_Format(PyExc_TypeError, "pack takes a module and four tuples");
  PyObject* parts[4];
  for (int i = 0; i < 4; ++i)
    if (!PyTuple_Check(parts[i] = PyTuple_GetItem(arguments[1], i)))
      return PyErr_Format(PyExc_TypeError, "pack takes a module and four tuples");
  auto [objects, dicts, empty, methods] = parts;
  PyObject* root_dict = PyObject_GenericGetDict(arguments[0], nullptr);
  if (root_dict == nullptr) return nullptr;
  std::vector<Word> words = {
      Word(PyTuple_Size(objects) / 2), Word(PyTuple_Size(empty)), Word(PyTuple_Size(methods) / 3),
      Word(PyTuple_Size(dicts) / 2), Word(has_versions)};
  append(words, objects);
  append(words, empty);
  append(words, methods);
  size_t contents = words.size() + 3 * words[kDicts];
  for (Py_ssize_t i = 0; i < PyTuple_Size(dicts); i += 2) {
    PyObject* dict = PyTuple_GetItem(dicts, i);
    const bool is_root = dict == Py_None;
    words.push_back(is_root ? 0 : word(dict));
    words.push_back(has_versions ? Word(layout_of(is_root ? root_dict : dict).version) : 0);
    words.push_back(contents);
    contents += 1 + PyTuple_Size(PyTuple_GetItem(dicts, i + 1));
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(dicts); i += 2) {
    PyObject* entries = PyTuple_GetItem(dicts, i + 1);
    words.push_back(Word(PyTuple_Size(entries) / 2));
    append(words, entries);
  }
  std::replace(words.begin() + kHeader, words.end(), word(Py_Ellipsis), Word(0));  // no number is an address
  Py_DECREF(root_dict);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(Word));
}

bool has_contents(PyObject* dict, const Word* contents) {
  if (Word(size_of(dict)) != *contents) return false;
  const Word* entry = contents + 1;
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value); entry += 2)
    if (entry[0] != word(key) || (entry[1] != word(value) && entry[1] != 0)) return false;
  return true;
}

bool has_dicts(const Word* words, const Word* part, PyObject* root_dict) {
  for (const Word* end = part + 3 * words[kDicts]; part < end; part += 3) {
    PyObject* dict = part[0] ? object(part[0]) : root_dict;
    if (words[kVersions] && layout_of(dict).version == part[1]) continue;
    if (!has_contents(dict, words + part[2])) return false;
  }
  return true;
}

// A method that is gone is None, as in the snapshot.
bool has_method(const Word* words) {
  PyObject* found = PyObject_GetAttr(object(words[0]), object(words[1]));
  if (found == nullptr) PyErr_Clear();
  const bool same = (found ? found : Py_None) == object(words[2]);
  Py_XDECREF(found);  // the class holds it
  return same;
}

bool is_unchanged(const Word* words, PyObject* root_dict) {
  const Word* part = words + kHeader;
  for (Word i = 0; i < words[kObjects]; ++i, part += 2)
    if (reinterpret_cast<Word>(Py_TYPE(object(part[0]))) != part[1]) return false;
  for (Word i = 0; i < words[kEmpty]; ++i, ++part)
    if (size_of(object(*part)) != 0) return false;
  const Word* methods = part;
  if (!has_dicts(words, methods + 3 * words[kMethods], root_dict)) return false;
  for (Word i = 0; i < words[kMethods]; ++i)
    if (!has_method(methods + 3 * i)) return false;
  return true;
}

// unchanged(root, snapshot): whether `root` and the modules below it are as `snapshot` says; nn/guard.py makes it and
// has the same function in Python. It is asked at every call of a block, so it compares addresses and nothing else: no
// Python code runs.
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "unchanged takes a module and a snapshot");
  PyObject *root = arguments[0], *kind = PyTuple_GetItem(arguments[1], 0), *packed = PyTuple_GetItem(arguments[1], 5);
  const char* bytes = packed ? PyBytes_AsString(packed) : nullptr;
  if (kind == nullptr || bytes == nullptr) return nullptr;
  if (PyBytes_Size(packed) < Py_ssize_t(kHeader * sizeof(Word)))
    return PyErr_Format(PyExc_ValueError, "the snapshot was not packed");
  bool same = reinterpret_cast<PyObject*>(Py_TYPE(root)) == kind;
  if (same) {
    PyObject* root_dict = PyObject_GenericGetDict(root, nullptr);
    if (root_dict == nullptr) return nullptr;
    same = is_unchanged(reinterpret_cast<const Word*>(bytes), root_dict);
    Py_DECREF(root_dict);
  }
  return PyBool_FromLong(same);
}

// What a launch of a Triton kernel is compiled for, as bytes that differ wherever Triton could compile another kernel:
// of a tensor its dtype and the last bits of its address, of anything else its kind and value. A size goes in front of
// what may be long, so that no two lists of arguments have the same bytes.
class LaunchKey {
 public:
  explicit LaunchKey(PyObject* tensor) : tensor_(reinterpret_cast<PyTypeObject*>(tensor)) { bytes_.reserve(512); }

  const std::string& bytes() const { return bytes_; }

  // Whether `value` is of a kind that is known; without, an exception may be set.
  bool add(PyObject* value) {
    PyTypeObject* type = Py_TYPE(value);
    if (PyType_IsSubtype(type, tensor_)) return add_tensor(value);
    if (type == &PyLong_Type) return add_integer(value);
    if (value == Py_None) return put('n', '0');
    if (type == &PyBool_Type) return put('b', value == Py_True);
    if (type == &PyFloat_Type) return put('f', PyFloat_AsDouble(value));
    if (type == &PyUnicode_Type) return add_text(value);
    return type == &PyTuple_Type && add_all(value);
  }

  bool add_all(PyObject* tuple) {
    const Py_ssize_t count = PyTuple_Size(tuple);
    put('(', count);
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!add(PyTuple_GetItem(tuple, i))) return false;
    return true;
  }

  bool add_options(PyObject* dict) {
    PyObject *name, *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &name, &value);)
      if (!add_text(name) || !add(value)) return false;
    return true;
  }

 private:
  template <class T>
  bool put(char kind, T value) {
    bytes_ += kind;
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return true;
  }

  bool add_integer(PyObject* value) {
    int overflow;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0 && put('i', number);
  }

  bool add_text(PyObject* value) {
    Py_ssize_t size;
    const char* utf8 = PyUnicode_AsUTF8AndSize(value, &size);
    if (utf8 == nullptr) return false;
    put('s', size);
    bytes_.append(utf8, size);
    return true;
  }

  bool add_tensor(PyObject* value) {
    static PyObject *const dtype_name = PyUnicode_InternFromString("dtype"), *const address_name =
                                                                                 PyUnicode_InternFromString("data_ptr");
    PyObject* dtype = PyObject_GetAttr(value, dtype_name);
    PyObject* address = dtype ? PyObject_CallMethodObjArgs(value, address_name, nullptr) : nullptr;
    const bool known = address != nullptr && Py_TYPE(address) == &PyLong_Type;
    if (known) {
      put('t', word(dtype));  // a dtype of torch is never freed
      put('a', char(PyLong_AsUnsignedLongLongMask(address) % 16));
    }
    Py_XDECREF(address);
    Py_XDECREF(dtype);
    return known;
  }

  PyTypeObject* tensor_;
  std::string bytes_;
};

// launch_key(torch.Tensor, arguments, options): the key of a launch, None where a value is of a kind that is not known;
// ops/triton_launch.py has the same function in Python.
PyObject* launch_key(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyDict_Check(arguments[2]))
    return PyErr_Format(PyExc_TypeError, "launch_key takes a class, a tuple and a dictionary");
  LaunchKey key(arguments[0]);
  if (key.add_all(arguments[1]) && key.add_options(arguments[2]))
    return PyBytes_FromStringAndSize(key.bytes().data(), key.bytes().size());
  PyErr_Clear();  // the launch itself tells what is wrong
  Py_RETURN_NONE;
}

PyObject* text(const std::string& value) { return PyUnicode_FromStringAndSize(value.data(), value.size()); }

// A list of what `make` gives for each item, a new reference or null.
template <class Items, class Make>
PyObject* list(const Items& items, Make make) {
  PyObject* made = PyList_New(items.size());
  for (size_t i = 0; made != nullptr && i < items.size(); ++i) {
    PyObject* item = make(items[i]);
    if (item == nullptr || PyList_SetItem(made, i, item) < 0) Py_CLEAR(made);
  }
  return made;
}

PyObject* py_supported_isas(PyObject*, PyObject*) { return list(isas_of(cpu_features()), text); }

PyObject* py_cpu_features(PyObject*, PyObject*) { return list(cpu_features(), text); }

PyObject* py_isa_features(PyObject*, PyObject*) {
  return list(isa_features(), [](const auto& variant) {
    return Py_BuildValue("(sN)", variant.first.c_str(), list(variant.second, text));
  });
}

PyObject* py_isas_of(PyObject*, PyObject* names) {
  Names features;
  const Py_ssize_t count = PySequence_Size(names);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* name = PySequence_GetItem(names, i);
    const char* utf8 = name ? PyUnicode_AsUTF8AndSize(name, nullptr) : nullptr;
    if (utf8 != nullptr) features.push_back(utf8);
    Py_XDECREF(name);
    if (utf8 == nullptr) return nullptr;
  }
  return count < 0 ? nullptr : list(isas_of(features), text);
}

PyObject* py_build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ssssss}", "compiler", MVIT3_COMPILER, "flags", MVIT3_FLAGS, "torch", MVIT3_TORCH);
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"supported_isas", py_supported_isas, METH_NOARGS,
     "Instruction sets of this CPU that a variant is built for, best first."},
    {"isa_features", py_isa_features, METH_NOARGS,
     "The variants, best first, each with the CPU features that it was compiled for."},
    {"cpu_features", py_cpu_features, METH_NOARGS, "Those of the features that this CPU has."},
    {"isas_of", py_isas_of, METH_O, "Variants that run on a CPU with these features, best first."},
    {"pack", fast(pack), METH_FASTCALL, "The last part of a snapshot of nn/guard.py."},
    {"unchanged", fast(unchanged), METH_FASTCALL,
     "Whether a module and those below it are as a snapshot of nn/guard.py says."},
    {"launch_key", fast(launch_key), METH_FASTCALL,
     "What a launch of a Triton kernel with these arguments and options is compiled for."},
    {"build_info", py_build_info, METH_NOARGS, "Compiler, flags and torch version of the build."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_host",
    "What this CPU can run and how the extension was built.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() {
  has_versions = find_versions();
  return PyErr_Occurred() ? nullptr : PyModule_Create(&definition);
}
