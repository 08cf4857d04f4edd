// memloc_ext._host: what Python asks of the build itself. No torch header, so it builds in seconds.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

// The clone that MEMLOC_CLONES functions resolve to on this machine.
const char* cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512 (x86-64-v4)";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2 (x86-64-v3)";
#endif
  return "baseline";
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = MEMLOC_CUDA_ARCHS;
  info["cpu_capability"] = cpu_capability();
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information.";
  m.def("build_info", &build_info, "Compiler, CUDA architectures built for (empty: none), CPU instruction set in use.");
}
