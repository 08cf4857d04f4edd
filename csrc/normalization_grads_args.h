// Gradients of scale and shift by example, the side that knows tensors: argument checks, and the memory that kernels
// see.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "check.h"
#include "normalization_grads.h"
#include "tensor_text.h"

namespace memloc {

struct NormalizationGradsArgs {
  torch::stable::Tensor input, grad_output, mean, rstd;

  void check() const;
  // Makes the operands readable along one of their dimensions, with copies where they are not.
  NormalizationGrads arrange(torch::stable::Tensor& scale, torch::stable::Tensor& shift);
};

inline void NormalizationGradsArgs::check() const {
  const char* const op = "normalization_grads: ";
  const torch::stable::Tensor* const tensors[] = {&input, &grad_output, &mean, &rstd};
  const char* const names[] = {"input", "grad_output", "mean", "rstd"};
  for (int i = 0; i < 4; ++i) MEMLOC_CHECK(tensors[i]->defined(), op, names[i], " must be a tensor, got None");
  using torch::headeronly::ScalarType;
  using torch::headeronly::toString;
  const ScalarType type = input.scalar_type();
  MEMLOC_CHECK(element_size(input) != 0, op, "input must have dtype float16, bfloat16, float32 or float64, got ",
               toString(type));
  MEMLOC_CHECK(input.dim() == 3, op, "input must be [batch, channels, positions], got ", shape_of(input));
  const ScalarType computed = type == ScalarType::Double ? type : ScalarType::Float;
  for (int i = 1; i < 4; ++i) {
    const torch::stable::Tensor& t = *tensors[i];
    const ScalarType expected = i == 1 ? type : computed;
    MEMLOC_CHECK(t.scalar_type() == expected, op, names[i], " must have dtype ", toString(expected),
                 " to go with input, got ", toString(t.scalar_type()));
    MEMLOC_CHECK(on_same_device(t, input), op, names[i], " must be on the device of input");
    bool fits = t.dim() == 3;
    for (int64_t d = 0; fits && d < 3; ++d) fits = t.size(d) == input.size(d) || (i > 1 && t.size(d) == 1);
    MEMLOC_CHECK(fits, op, names[i], " must have the shape of input, ", shape_of(input),
                 i > 1 ? ", or 1 where it is shared, got " : ", got ", shape_of(t));
  }
}

inline NormalizationGrads NormalizationGradsArgs::arrange(torch::stable::Tensor& scale, torch::stable::Tensor& shift) {
  using torch::stable::Tensor;
  const auto dense = [](const Tensor& t, int64_t d) { return t.size(d) == 1 || t.stride(d) == 1; };
  const bool planes = dense(input, 2) && input.size(2) >= input.size(1);
  const int64_t inner = dense(input, 1) && !planes ? 1 : 2;
  const auto along = [&](const Tensor& t) {
    if (dense(t, inner)) return t;
    if (inner == 2) return torch::stable::contiguous(t);
    return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 1, 2)), 1, 2);
  };
  input = along(input), grad_output = along(grad_output), mean = along(mean), rstd = along(rstd);
  const auto strides = [](const Tensor& t) {
    const auto step = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
    return NormalizationStrides{step(0), step(1), step(2)};
  };
  return {input.const_data_ptr(),
          grad_output.const_data_ptr(),
          mean.const_data_ptr(),
          rstd.const_data_ptr(),
          scale.mutable_data_ptr(),
          shift.mutable_data_ptr(),
          strides(input),
          strides(grad_output),
          strides(mean),
          strides(rstd),
          input.size(0),
          input.size(1),
          input.size(2),
          inner == 1};
}

// On the CPU: runs the kernel for operands of this type. Nothing may be empty.
void add_normalization_grads(const NormalizationGrads& n, torch::headeronly::ScalarType type);

// A result, [batch, channels].
inline torch::stable::Tensor normalization_grad(const NormalizationGradsArgs& args) {
  const std::vector<int64_t> sizes{args.input.size(0), args.input.size(1)};
  return torch::stable::new_empty(args.input, torch::headeronly::IntHeaderOnlyArrayRef(sizes), args.rstd.scalar_type());
}

}  // namespace memloc
