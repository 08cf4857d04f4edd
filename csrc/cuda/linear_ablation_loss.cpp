// linear_ablation_loss on CUDA: unwraps tensors, guards the device, launches on the current stream. Never waits for the
// device, so that it can be captured in a graph; for that reason a target out of range is not refused here: its loss is
// NaN.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/linear_ablation_loss_kernel.h"
#include "linear_ablation_loss_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> linear_ablation_loss(const Tensor& features, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& targets,
                                                const Tensor& baseline) {
  const LinearAblationLossArgs args{features, weight, bias, targets, baseline};
  args.check();
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  Tensor loss = args.result(args.loss_type()), predicted = args.result(ScalarType::Long);
  if (loss.numel() == 0) return {loss, predicted};
  const LinearAblationLossInputs inputs(args);
  check_cuda(linear_ablation_loss_cuda(inputs.problem(), args.loss_type() == ScalarType::Double,
                                       loss.mutable_data_ptr(), static_cast<int64_t*>(predicted.mutable_data_ptr()),
                                       current_stream(features.get_device_index())),
             "linear_ablation_loss");
  return {loss, predicted};
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("linear_ablation_loss", TORCH_BOX(&memloc::linear_ablation_loss));
}
