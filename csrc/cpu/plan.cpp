// The cost model as an operator, for what calls no C++ of its own.
#include "plan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace memloc {
namespace {

AxisNumbers axis(const char* name, const std::vector<int64_t>& numbers) {
  AxisNumbers axis;
  MEMLOC_CHECK(numbers.size() == axis.size(), "plan: ", name,
               " must be size, kernel, stride, padding and dilation, got ", numbers.size(), " numbers");
  std::copy(numbers.begin(), numbers.end(), axis.begin());
  return axis;
}

GradSqnormPlan plan(int64_t groups, int64_t inputs, int64_t outputs, std::vector<int64_t> y, std::vector<int64_t> x,
                    int64_t directions) {
  return grad_sqnorm_plan(groups, inputs, outputs, axis("y", y), axis("x", x), directions);
}

}  // namespace
}  // namespace memloc

// Without tensors there is no device.
STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CompositeExplicitAutograd, m) { m.impl("plan", TORCH_BOX(&memloc::plan)); }
