// Per-example gradient norms on CUDA together with the sums of the gradients over groups of examples. Never waits for
// the device, so an example whose group is none of [0, num_groups) is refused by Groups alone, and here is in no sum.
//
// On tensor cores one pass gives the norms and the sum over all examples. Everything else is composed: the norms, and
// for each group a weight gradient with zeros in the rows of the others, summed in float32.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/grad_sqnorm_ways.h"
#include "cuda/launch.h"
#include "grad_sqnorm_args.h"

namespace memloc {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_zeros(like, IntHeaderOnlyArrayRef(sizes), type);
}

ScalarType sum_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The rows of t in group k, and zeros for the others.
Tensor rows_of(const Tensor& t, const Tensor& group_ids, int64_t k) {
  Tensor number = zeros(group_ids, {1}, ScalarType::Long);
  torch::stable::fill_(number, static_cast<double>(k));
  std::vector<int64_t> sizes(t.dim(), 1);
  sizes[0] = t.size(0);
  const Tensor own =
      torch::stable::reshape(call("aten::eq", "Tensor", group_ids, number), IntHeaderOnlyArrayRef(sizes));
  return call("aten::where", "self", own, t, zeros(t, {1}, t.scalar_type()));
}

// `total(x, g, to)` writes the sum over all rows, a view of the result.
template <typename Total>
std::tuple<Tensor, Tensor> norms_and_groups(const Tensor& x, const Tensor& g, const Tensor& group_ids,
                                            int64_t num_groups, const GradSqnormShape& shape,
                                            std::vector<int64_t> weight, const Total& total) {
  weight.insert(weight.begin(), num_groups);
  Tensor sums = zeros(x, weight, sum_type(x));
  const bool none = x.numel() == 0 || g.numel() == 0;
  const bool on_tensor_cores = tensor_way_applies(x, shape) && shape.tensor_sums();
  const cudaStream_t stream = current_stream(x.get_device_index());
  Tensor of_group = zeros(x, {x.size(0)}, sum_type(x));
  if (!none && num_groups == 1 && on_tensor_cores) {
    tensor_way(x, g, shape, of_group, &sums, stream);
    return {of_group, sums};
  }
  const Tensor norms = grad_sqnorm(shape.choose_cuda(element_size(x) == 2), x, g, shape);
  for (int64_t k = 0; !none && k < num_groups; ++k) {
    const Tensor own_x = rows_of(x, group_ids, k), own_g = rows_of(g, group_ids, k);
    Tensor to = torch::stable::select(sums, 0, k);
    if (on_tensor_cores) {
      tensor_way(own_x, own_g, shape, of_group, &to, stream);
    } else {
      total(own_x, own_g, to);
    }
  }
  return {norms, sums};
}

std::tuple<Tensor, Tensor> linear_grad_sqnorm_groups(const Tensor& input, const Tensor& grad_output,
                                                     const Tensor& group_ids, int64_t num_groups) {
  const char* const op = "linear_grad_sqnorm_groups";
  const GradSqnormShape shape = linear_shape(op, input, grad_output);
  check_groups(op, input, group_ids, num_groups);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto total = [&](const Tensor& x, const Tensor& g, const Tensor& to) {
    const auto matrix = [](const Tensor& t) {  // [1, features, rows]
      const std::vector<int64_t> sizes{1, t.size(0) * t.size(3), t.size(1)};
      const Tensor rows = torch::stable::transpose(torch::stable::transpose(t, 1, 2), 2, 3);
      return torch::stable::transpose(torch::stable::reshape(rows, IntHeaderOnlyArrayRef(sizes)), 1, 2);
    };
    const std::vector<int64_t> sizes{1, shape.outputs, shape.inputs};
    multiply(matrix(g), torch::stable::transpose(matrix(x), 1, 2),
             torch::stable::view(to, IntHeaderOnlyArrayRef(sizes)));
  };
  return norms_and_groups(image_of(detached(input), shape), image_of(detached(grad_output), shape), group_ids,
                          num_groups, shape, {shape.outputs, shape.inputs}, total);
}

std::tuple<Tensor, Tensor> conv2d_grad_sqnorm_groups(const Tensor& input, const Tensor& grad_output,
                                                     const Tensor& group_ids, int64_t num_groups,
                                                     std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                     int64_t groups) {
  const char* const op = "conv2d_grad_sqnorm_groups";
  const GradSqnormShape shape = conv2d_shape(op, input, grad_output, kernel_size, stride, padding, dilation, groups);
  check_groups(op, input, group_ids, num_groups);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const std::vector<int64_t> weight{groups * shape.outputs, shape.inputs, kernel_size[0], kernel_size[1]};
  const auto total = [&](const Tensor& x, const Tensor& g, Tensor& to) {
    using torch::stable::detail::from;
    const ScalarType type = sum_type(x);
    const bool weight_only[] = {false, true, false};
    const std::vector<int64_t> no_output_padding{0, 0};
    StableIValue stack[] = {from(torch::stable::to(g, type)),
                            from(torch::stable::to(x, type)),
                            from(to),
                            from(std::optional<std::vector<int64_t>>()),
                            from(stride),
                            from(padding),
                            from(dilation),
                            from(false),
                            from(no_output_padding),
                            from(groups),
                            from(torch::headeronly::HeaderOnlyArrayRef<bool>(weight_only, 3))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack, TORCH_ABI_VERSION));
    const Tensor grads[] = {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
                            torch::stable::detail::to<Tensor>(stack[2])};
    torch::stable::copy_(to, grads[1]);
  };
  return norms_and_groups(detached(input), detached(grad_output), group_ids, num_groups, shape, weight, total);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("linear_grad_sqnorm_groups", TORCH_BOX(&memloc::linear_grad_sqnorm_groups));
  m.impl("conv2d_grad_sqnorm_groups", TORCH_BOX(&memloc::conv2d_grad_sqnorm_groups));
}
