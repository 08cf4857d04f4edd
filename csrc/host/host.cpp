// memloc_ext._host: what Python asks of the build itself. No torch header, so it builds in seconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan.h"

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
  m.doc() = "Build information and cost models.";
  m.def("build_info", &build_info, "Compiler, CUDA architectures built for (empty: none), CPU instruction set in use.");
  m.def("grad_sqnorm_plan", &memloc::grad_sqnorm_plan, py::arg("groups"), py::arg("inputs"), py::arg("outputs"),
        py::arg("y"), py::arg("x"), py::arg("directions") = 0,
        "The way that is taken (0 outer, 1 direct, 2 gram); the multiply-adds per example of each, infinite where it "
        "does not apply; whether sums over groups, and inner products with directions, come from the same pass. Axes: "
        "size, kernel, stride, padding, dilation.");
}
