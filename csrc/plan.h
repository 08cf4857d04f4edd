// How a layer's per-example norms are computed, and what that costs: GradSqnormShape, asked from outside.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "grad_sqnorm.h"

namespace memloc {

using AxisNumbers = std::array<int64_t, 5>;  // size, kernel, stride, padding, dilation

// The way that auto takes on the CPU, a GradSqnormMethod; the multiply-adds per example of outer (infinite where it
// does not apply), direct and gram; whether the sums over groups, and the inner products with so many directions, come
// from the same pass. Numbers only: graphs hold no text.
using GradSqnormPlan = std::tuple<int64_t, double, double, double, bool>;

// inputs and outputs of one group. Throws std::invalid_argument if there is no such layer.
inline GradSqnormPlan grad_sqnorm_plan(int64_t groups, int64_t inputs, int64_t outputs, const AxisNumbers& y,
                                       const AxisNumbers& x, int64_t directions = 0) {
  const GradSqnormShape shape{groups, inputs, outputs, {y[0], y[1], y[2], y[3], y[4]}, {x[0], x[1], x[2], x[3], x[4]}};
  if (groups < 1 || inputs < 0 || outputs < 0 || !shape.y.valid() || !shape.x.valid()) {
    throw std::invalid_argument(
        "plan: kernel_size, stride and dilation must be at least 1, padding at least 0, groups must divide the "
        "channels, and the kernel must fit into the padded image");
  }
  if (directions < 0) throw std::invalid_argument("plan: directions must be at least 0");
  const double outer = shape.outer_applies() ? shape.outer() : std::numeric_limits<double>::infinity();
  return {static_cast<int64_t>(shape.choose()), outer, shape.direct(), shape.gram(), shape.fused(directions)};
}

}  // namespace memloc
