// One direct pass over the examples' weight gradients on the CPU, for the operators that ask for more than norms.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu/grad_sqnorm_kernels.h"
#include "grad_sqnorm_args.h"

namespace memloc {

// The examples in the order of their groups, and those; one group if there are none.
struct ExampleOrder {
  std::vector<int64_t> examples, ids;

  ExampleOrder(const char* op, int64_t count, const std::optional<torch::stable::Tensor>& group_ids, int64_t num_groups)
      : examples(count), ids(count) {
    std::iota(examples.begin(), examples.end(), int64_t{0});
    if (!group_ids) return;
    const int64_t* const given = static_cast<const int64_t*>(group_ids->const_data_ptr());
    const int64_t step = group_ids->stride(0);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t id = given[b * step];
      MEMLOC_CHECK(id >= 0 && id < num_groups, op, ": group_ids must be in [0, ", num_groups, "), got ", id);
    }
    const auto before = [&](int64_t a, int64_t b) { return given[a * step] < given[b * step]; };
    std::stable_sort(examples.begin(), examples.end(), before);
    for (int64_t i = 0; i < count; ++i) ids[i] = given[examples[i] * step];
  }
};

// Adds to what is zero: squared norms [batch], inner products [directions, batch], and sums [num_groups, *weight].
template <typename Source, typename E>
void add_grads(const GradSqnormProblem<Source>& problem, const GradSqnormShape& s, const ExampleOrder& order,
               const E* directions, int64_t num_directions, double* sqnorm, double* dots, E* sums, int64_t num_groups);

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
