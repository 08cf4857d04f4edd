// Inner products of each example's weight gradient with directions, on the CPU: from the pass of
// grad_sqnorm_groups.cpp, in which every tile of the gradient is in registers.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/grad_sqnorm_groups.h"
#include "cpu/grad_sqnorm_tensors.h"
#include "grad_dot_args.h"

namespace memloc {
namespace {

using torch::stable::Tensor;
using Results = std::tuple<Tensor, Tensor, Tensor>;

Results linear_grad_dot(const Tensor& input, const Tensor& grad_output, const Tensor& directions,
                        const std::optional<Tensor>& group_ids, int64_t num_groups) {
  const char* const op = "linear_grad_dot";
  const GradSqnormShape s = linear_shape(op, input, grad_output);
  const std::vector<int64_t> weight{s.outputs, s.inputs};
  check_grad_dot(op, input, directions, weight, group_ids, num_groups);
  const GradPass pass =
      grad_pass(op, image_of(input, s), image_of(grad_output, s), directions, group_ids, num_groups, s, weight);
  return {pass.dot, pass.sqnorm, pass.sums};
}

Results conv2d_grad_dot(const Tensor& input, const Tensor& grad_output, const Tensor& directions,
                        const std::optional<Tensor>& group_ids, int64_t num_groups, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        int64_t groups) {
  const char* const op = "conv2d_grad_dot";
  const GradSqnormShape s = conv2d_shape(op, input, grad_output, kernel_size, stride, padding, dilation, groups);
  const std::vector<int64_t> weight{groups * s.outputs, s.inputs, kernel_size[0], kernel_size[1]};
  check_grad_dot(op, input, directions, weight, group_ids, num_groups);
  const GradPass pass = grad_pass(op, input, grad_output, directions, group_ids, num_groups, s, weight);
  return {pass.dot, pass.sqnorm, pass.sums};
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("linear_grad_dot", TORCH_BOX(&memloc::linear_grad_dot));
  m.impl("conv2d_grad_dot", TORCH_BOX(&memloc::conv2d_grad_dot));
}
