// Channel saliency on CUDA: unwraps tensors, guards the device, launches on the current stream. Never waits for the
// device, so that it can be captured in a graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "channel_saliency_args.h"
#include "cuda/channel_saliency_kernel.h"
#include "cuda/launch.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

Tensor channel_saliency(const Tensor& activation, const Tensor& grad, int64_t channel_dim) {
  const ChannelSaliencyArgs args{activation, grad, channel_dim};
  args.check();
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  Tensor out = args.result();
  if (activation.numel() == 0) return out;
  check_cuda(
      channel_saliency_cuda(activation.const_data_ptr(), grad.const_data_ptr(), element_type(activation), args.layout(),
                            out.mutable_data_ptr(), current_stream(activation.get_device_index())),
      "channel_saliency");
  return out;
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) { m.impl("channel_saliency", TORCH_BOX(&memloc::channel_saliency)); }
