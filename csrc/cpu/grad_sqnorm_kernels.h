// The CPU kernels of per-example gradient norms, and how an instruction set provides them.
#pragma once

#include <cstdint>

#include "grad_sqnorm.h"

namespace memloc {

// A strided operand [batch, channels, rows, columns]; a linear layer is an image of one row, whose columns are its
// positions.
template <typename Source>
struct Operand {
  const Source* data;
  int64_t batch, channel, row, column;  // strides, in elements
};

template <typename Source>
struct GradSqnormProblem {
  Operand<Source> x, g;
  int64_t groups, inputs, outputs;  // inputs and outputs of one group
  Axis row, column;
};

// sqnorm[b] = squared norm, for b in [begin, end). Source: float, double, or a 16-bit type that is computed in float.
template <typename Source>
using GradSqnormKernel = void (*)(const GradSqnormProblem<Source>&, double* sqnorm, int64_t begin, int64_t end);

template <typename Source>
struct GradSqnormKernels {
  GradSqnormKernel<Source> direct, gram;
};

template <typename Source>
GradSqnormKernels<Source> grad_sqnorm_baseline();
template <typename Source>
GradSqnormKernels<Source> grad_sqnorm_avx2();
template <typename Source>
GradSqnormKernels<Source> grad_sqnorm_avx512();

}  // namespace memloc
