// bigkern._info: what was built and what it is made of, and where tensors lie. No torch.
//
// The kernels live in _ops; this module finds the few C functions that _ops exports by name.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "addresses.h"
#include "common/cpu/isa.h"
#include "common/kernel_info.h"

namespace py = pybind11;

namespace {

// A function of the _ops library, which the caller has loaded already.
template <class Function>
Function* exported(const std::string& ops_library, const char* name) {
  void* library = dlopen(ops_library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) throw std::runtime_error(ops_library + " is not loaded");
  void* symbol = dlsym(library, name);
  dlclose(library);
  if (symbol == nullptr) throw std::runtime_error(ops_library + " has no " + name);
  return reinterpret_cast<Function*>(symbol);
}

py::dict build() {
  py::dict out;
  out["torch"] = BIGKERN_TORCH;
  out["compiler"] = __VERSION__;
  out["cuda"] = BIGKERN_CUDA_VERSION;
  out["architectures"] = BIGKERN_ARCHITECTURES;
  out["why_no_cuda"] = BIGKERN_WHY_NO_CUDA;
  out["sources"] = BIGKERN_SOURCES;
  return out;
}

std::string isa(const std::string& ops_library) {
  const int level = exported<int()>(ops_library, "bigkern_isa")();
  return bigkern::isa_name(static_cast<bigkern::Isa>(level));
}

void set_isa(const std::string& ops_library, const std::string& name) {
  for (int level = 0; level < bigkern::isa_count; ++level) {
    if (name != bigkern::isa_name(static_cast<bigkern::Isa>(level))) continue;
    if (exported<int(int)>(ops_library, "bigkern_set_isa")(level)) return;
    throw py::value_error("this CPU has no " + name);
  }
  throw py::value_error("isa must be portable, avx2, avx512 or avx512bf16, not " + name);
}

std::vector<py::dict> kernels(const std::string& ops_library) {
  constexpr int kCapacity = 1024;
  std::vector<bigkern::KernelInfo> table(kCapacity);
  const int count = exported<int(bigkern::KernelInfo*, int)>(ops_library, "bigkern_kernels")(
      table.data(), kCapacity);
  std::vector<py::dict> out;
  for (int i = 0; i < count; ++i) {
    py::dict row;
    row["name"] = table[i].name;
    row["registers"] = table[i].registers;
    row["spills"] = table[i].spills;
    row["static_smem"] = table[i].static_smem;
    row["dynamic_smem"] = table[i].dynamic_smem;
    row["max_threads"] = table[i].max_threads;
    out.push_back(row);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "What was built, and what the compiler made of it.";
  m.def(
      "build", &build,
      "torch, compiler, CUDA version and architectures of this build, and a hash of its sources.");
  m.def("isa", &isa, py::arg("ops_library"), "The instruction set that the CPU kernels use.");
  m.def("set_isa", &set_isa, py::arg("ops_library"), py::arg("name"),
        "Use this instruction set; ValueError if the CPU lacks it.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int level = 0; level <= static_cast<int>(bigkern::detected_isa()); ++level)
          names.push_back(bigkern::isa_name(static_cast<bigkern::Isa>(level)));
        return names;
      },
      "The instruction sets that this CPU has, from the least to the best.");
  m.def("kernels", &kernels, py::arg("ops_library"),
        "Registers, spilled bytes, shared memory of every CUDA kernel.");
  m.def("addresses", &bigkern::addresses, py::arg("tensors"), "Each tensor's address, an int64.");
  m.def("layouts", &bigkern::layouts, py::arg("tensors"),
        "How the tensors are stored, their addresses aside, as bytes to be compared.");
}
