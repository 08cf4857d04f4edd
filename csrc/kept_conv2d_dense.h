// A convolution that reads some input channels of each example, and its gradients, by the library's convolution over
// all channels, those that are not kept being zeros: for devices without a kernel, and where a kernel would be slower.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "kept_conv2d_args.h"

namespace memloc {

inline torch::stable::Tensor zero_unless_kept(const torch::stable::Tensor& x, const torch::stable::Tensor& keep) {
  using torch::stable::detail::from;
  const std::vector<int64_t> one{1};
  const torch::stable::Tensor zero = torch::stable::new_zeros(x, torch::headeronly::IntHeaderOnlyArrayRef(one));
  const torch::stable::Tensor mask = torch::stable::unsqueeze(torch::stable::unsqueeze(keep, 2), 3);
  std::array<StableIValue, 3> stack{from(mask), from(x), from(zero)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::where", "self", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline torch::stable::Tensor dense_conv2d(const torch::stable::Tensor& x, const torch::stable::Tensor& keep,
                                          const torch::stable::Tensor& weight,
                                          const std::optional<torch::stable::Tensor>& bias,
                                          const KeptConv2dGeometry& geometry) {
  using torch::stable::detail::from;
  const std::vector<int64_t> none{0, 0};
  std::array<StableIValue, 9> stack{
      from(zero_unless_kept(x, keep)), from(weight), from(bias), from(geometry.stride), from(geometry.padding),
      from(geometry.dilation),         from(false),  from(none), from(geometry.groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<torch::stable::Tensor>(stack[0]));
}

// Gradients of the input, of the weight and of nothing; of those not wanted, the tensor itself gives its sizes alone.
inline std::array<torch::stable::Tensor, 3> dense_conv2d_grads(const torch::stable::Tensor& grad,
                                                               const torch::stable::Tensor& x,
                                                               const torch::stable::Tensor& weight,
                                                               const KeptConv2dGeometry& geometry, bool of_input) {
  using torch::stable::Tensor;
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::vector<int64_t> none{0, 0};
  const bool wanted[] = {of_input, !of_input, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(std::nullopt),
                                     from(geometry.stride),
                                     from(geometry.padding),
                                     from(geometry.dilation),
                                     from(false),
                                     from(none),
                                     from(geometry.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

inline torch::stable::Tensor dense_conv2d_input_grad(const torch::stable::Tensor& grad,
                                                     const torch::stable::Tensor& keep,
                                                     const torch::stable::Tensor& weight,
                                                     const std::vector<int64_t>& input_size,
                                                     const KeptConv2dGeometry& geometry) {
  const std::vector<int64_t> sizes{keep.size(0), keep.size(1), input_size[0], input_size[1]};
  const torch::stable::Tensor x = torch::stable::new_empty(grad, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  const torch::stable::Tensor result = dense_conv2d_grads(grad, x, weight, geometry, true)[0];
  return torch::stable::contiguous(zero_unless_kept(result, keep));
}

inline torch::stable::Tensor dense_conv2d_weight_grad(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                                                      const torch::stable::Tensor& keep,
                                                      const std::vector<int64_t>& kernel_size,
                                                      const KeptConv2dGeometry& geometry) {
  const std::vector<int64_t> sizes{grad.size(1), x.size(1) / geometry.groups, kernel_size[0], kernel_size[1]};
  const torch::stable::Tensor weight = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  return torch::stable::contiguous(dense_conv2d_grads(grad, zero_unless_kept(x, keep), weight, geometry, false)[1]);
}

}  // namespace memloc
