// Example-tied dropout on CUDA: unwraps tensors, guards the device, launches on the current stream. Never waits for the
// device, so that it can be captured in a graph; for that reason a negative id is not refused here but taken as the
// unsigned number with the same bits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/example_tied_dropout_kernel.h"
#include "cuda/launch.h"
#include "example_tied_dropout_args.h"

namespace memloc {
namespace {

torch::stable::Tensor example_tied_dropout(const torch::stable::Tensor& x, const torch::stable::Tensor& example_ids,
                                           int64_t num_generalization, double p_mem, int64_t seed, int64_t site,
                                           int64_t channel_dim) {
  const ExampleTiedDropoutArgs args{x, example_ids, num_generalization, p_mem, seed, site, channel_dim};
  args.check();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  torch::stable::Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  check_cuda(example_tied_dropout_cuda(y.mutable_data_ptr(), x.const_data_ptr(),
                                       static_cast<const int64_t*>(example_ids.const_data_ptr()), element_size(x),
                                       args.mask(), args.layout(y), current_stream(x.get_device_index())),
             "example_tied_dropout");
  return y;
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("example_tied_dropout", TORCH_BOX(&memloc::example_tied_dropout));
}
