// Inner products of each example's weight gradient with given directions: argument checks beyond those of its norms.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "grad_sqnorm_args.h"

namespace memloc {

// directions [D, *weight]; group_ids as check_groups has them, or none of them and no groups.
inline void check_grad_dot(const char* op, const torch::stable::Tensor& input, const torch::stable::Tensor& directions,
                           const std::vector<int64_t>& weight, const std::optional<torch::stable::Tensor>& group_ids,
                           int64_t num_groups) {
  using torch::headeronly::ScalarType;
  MEMLOC_CHECK(directions.defined(), op, ": directions must be a tensor, got None");
  const ScalarType dtype = element_size(input) == 8 ? ScalarType::Double : ScalarType::Float;
  MEMLOC_CHECK(directions.scalar_type() == dtype, op, ": directions must have dtype ",
               torch::headeronly::toString(dtype), " for input of ", torch::headeronly::toString(input.scalar_type()),
               ", got ", torch::headeronly::toString(directions.scalar_type()));
  MEMLOC_CHECK(on_same_device(directions, input), op, ": directions must be on the device of input");
  const int64_t count = static_cast<int64_t>(weight.size());
  bool same = directions.dim() == count + 1 && directions.size(0) >= 1;
  std::string sizes = "[D";
  for (int64_t d = 0; d < count; ++d) {
    same = same && directions.size(d + 1) == weight[d];
    sizes += ", " + std::to_string(weight[d]);
  }
  MEMLOC_CHECK(same, op, ": directions must have shape ", sizes, "] with D at least 1, got ", shape_of(directions));
  if (group_ids) return check_groups(op, input, *group_ids, num_groups);
  MEMLOC_CHECK(num_groups == 0, op, ": num_groups must be 0 without group_ids, got ", num_groups);
}

}  // namespace memloc
