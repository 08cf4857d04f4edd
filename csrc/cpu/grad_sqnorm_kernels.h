// The CPU kernels of per-example gradient norms, and how an instruction set provides them.
#pragma once

#include <cstdint>

namespace memloc {

// A strided operand [batch, channels, rows, columns]; a linear layer's positions are the columns of a single row.
template <typename Source>
struct Operand {
  const Source* data;
  int64_t batch, channel, row, column;  // strides, in elements
};

// What a kernel asks of an axis (see Axis in grad_sqnorm.h, whose functions use the standard library): position r meets
// pixel r * stride + i * dilation - padding.
struct KernelAxis {
  int64_t size, positions, kernel, stride, padding, dilation, residues;
};

template <typename Source>
struct GradSqnormProblem {
  Operand<Source> x, g;
  int64_t groups, inputs, outputs;  // inputs and outputs of one group
  KernelAxis row, column;
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
