// Gradients of scale and shift by example on CUDA: unwraps tensors, guards the device, launches on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/normalization_grads_kernel.h"
#include "normalization_grads_args.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> normalization_grads(const Tensor& input, const Tensor& grad_output, const Tensor& mean,
                                               const Tensor& rstd) {
  NormalizationGradsArgs args{input, grad_output, mean, rstd};
  args.check();
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor scale = normalization_grad(args), shift = normalization_grad(args);
  if (scale.numel() == 0) return {scale, shift};
  if (input.numel() == 0) return {torch::stable::zero_(scale), torch::stable::zero_(shift)};
  const NormalizationGrads n = args.arrange(scale, shift);
  check_cuda(normalization_grads_cuda(n, element_type(input), current_stream(input.get_device_index())),
             "normalization_grads");
  return {scale, shift};
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("normalization_grads", TORCH_BOX(&memloc::normalization_grads));
}
