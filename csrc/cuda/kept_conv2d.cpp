// A convolution that reads some input channels of each example, on CUDA: by the library's, over all channels. No kernel
// of our own skips any there. Never waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "kept_conv2d_dense.h"

namespace memloc {
namespace {

using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;

Tensor kept_conv2d(const Tensor& x, const Tensor& keep, const Tensor& weight, std::optional<Tensor> bias,
                   Numbers stride, Numbers padding, Numbers dilation, int64_t groups) {
  const KeptConv2dGeometry geometry{stride, padding, dilation, groups};
  check_kept_conv2d(x, keep, weight, bias, geometry);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return dense_conv2d(x, keep, weight, bias, geometry);
}

Tensor kept_conv2d_input_grad(const Tensor& grad, const Tensor& keep, const Tensor& weight, Numbers input_size,
                              Numbers stride, Numbers padding, Numbers dilation, int64_t groups) {
  const KeptConv2dGeometry geometry{stride, padding, dilation, groups};
  check_kept_input_grad(grad, keep, weight, input_size, geometry);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  return dense_conv2d_input_grad(grad, keep, weight, input_size, geometry);
}

Tensor kept_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& keep, Numbers kernel_size,
                               Numbers stride, Numbers padding, Numbers dilation, int64_t groups) {
  const KeptConv2dGeometry geometry{stride, padding, dilation, groups};
  check_kept_weight_grad(grad, x, keep, kernel_size, geometry);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return dense_conv2d_weight_grad(grad, x, keep, kernel_size, geometry);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("kept_conv2d", TORCH_BOX(&memloc::kept_conv2d));
  m.impl("kept_conv2d_input_grad", TORCH_BOX(&memloc::kept_conv2d_input_grad));
  m.impl("kept_conv2d_weight_grad", TORCH_BOX(&memloc::kept_conv2d_weight_grad));
}
