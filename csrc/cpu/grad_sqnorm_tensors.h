// Per-example gradient norms on the CPU: from tensors to a kernel's problem, and the kernels of this machine. Those are
// in grad_sqnorm_kernels.inc, compiled once per instruction set (grad_sqnorm_*.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/grad_sqnorm_kernels.h"
#include "cpu/instruction_set.h"
#include "grad_sqnorm.h"

namespace memloc {

template <typename Source>
GradSqnormKernels<Source> kernels() {
  return for_this_machine([](auto set) { return grad_sqnorm_kernels<set.value, Source>(); });
}

template <typename Source>
Operand<Source> operand(const torch::stable::Tensor& t) {
  return {static_cast<const Source*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <typename Source>
GradSqnormProblem<Source> problem_of(const torch::stable::Tensor& x, const torch::stable::Tensor& g,
                                     const GradSqnormShape& s) {
  return {operand<Source>(x), operand<Source>(g), s.groups, s.inputs, s.outputs, s.y, s.x};
}

}  // namespace memloc
