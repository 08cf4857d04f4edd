// One direct pass over the examples' weight gradients on the CPU, for the operators that ask for more than norms.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "grad_sqnorm_args.h"

namespace memloc {

// What the pass gives, float64 for float64 inputs, else float32.
struct GradPass {
  torch::stable::Tensor dot;     // [directions, batch]
  torch::stable::Tensor sqnorm;  // [batch]
  torch::stable::Tensor sums;    // [num_groups, *weight]
};

// x [batch, groups * inputs, height, width], g [batch, groups * outputs, rows, columns], directions [D, *weight] or
// none, checked but for the values of group_ids. Without those there are no sums.
GradPass grad_pass(const char* op, const torch::stable::Tensor& x, const torch::stable::Tensor& g,
                   const std::optional<torch::stable::Tensor>& directions,
                   const std::optional<torch::stable::Tensor>& group_ids, int64_t num_groups, const GradSqnormShape& s,
                   const std::vector<int64_t>& weight);

}  // namespace memloc
