// memloc_ext._host: what Python asks of the build itself. No torch header, so it builds in seconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <tuple>

#include "grad_sqnorm.h"

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

using Numbers = std::array<int64_t, 5>;

std::tuple<std::string, std::map<std::string, double>, bool> grad_sqnorm_plan(int64_t groups, int64_t inputs,
                                                                              int64_t outputs, const Numbers& y,
                                                                              const Numbers& x) {
  const memloc::GradSqnormShape shape{
      groups, inputs, outputs, {y[0], y[1], y[2], y[3], y[4]}, {x[0], x[1], x[2], x[3], x[4]}};
  if (groups < 1 || inputs < 0 || outputs < 0 || !shape.y.valid() || !shape.x.valid()) {
    throw py::value_error(
        "plan: kernel_size, stride and dilation must be at least 1, padding at least 0, groups must divide the "
        "channels, "
        "and the kernel must fit into the padded image");
  }
  std::map<std::string, double> counts{{"direct", shape.direct()}, {"gram", shape.gram()}};
  if (shape.outer_applies()) counts["outer"] = shape.outer();
  const char* const names[] = {"outer", "direct", "gram"};
  return {names[static_cast<int>(shape.choose())], counts, shape.fused()};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information and cost models.";
  m.def("build_info", &build_info, "Compiler, CUDA architectures built for (empty: none), CPU instruction set in use.");
  m.def("grad_sqnorm_plan", &grad_sqnorm_plan, py::arg("groups"), py::arg("inputs"), py::arg("outputs"), py::arg("y"),
        py::arg("x"),
        "The way that is taken, the multiply-adds per example of each, and whether sums over groups come from the same "
        "pass; axes are (size, kernel, stride, padding, dilation).");
}
