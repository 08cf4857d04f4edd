// Rows with channels switched off, on CUDA: torch copies the rows, the kernel fills what is switched off. Never waits
// for the device, so that it can be captured in a graph; for that reason offsets and channels out of range are not
// refused but ignored.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ablate_channels_args.h"
#include "cuda/ablation_kernel.h"
#include "cuda/launch.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

void fill(const AblateChannelsArgs& args, const Tensor& y) {
  const int64_t channel = args.channel();
  if (y.numel() == 0 || args.channels.size(0) == 0) return;
  AblateChannelsProblem problem{};
  problem.y = y.mutable_data_ptr();
  problem.width = element_size(y);
  problem.rows = args.rows();
  problem.row_step = y.stride(0);
  problem.channels = args.num_channels();
  problem.channel_step = y.stride(channel);
  problem.offsets = static_cast<const int64_t*>(args.offsets.const_data_ptr());
  problem.offset_step = args.offsets.stride(0);
  problem.off = static_cast<const int64_t*>(args.channels.const_data_ptr());
  problem.off_step = args.channels.stride(0);
  problem.entries = args.channels.size(0);
  problem.baseline = args.baseline ? args.baseline->const_data_ptr() : nullptr;
  problem.baseline_step = args.baseline ? args.baseline->stride(0) : 0;
  for (int64_t d = 1; d < y.dim(); ++d) {
    if (d != channel) problem.positions.loop[problem.positions.count++] = {y.size(d), y.stride(d), y.stride(d), 0, 0};
  }
  problem.positions.simplify();
  check_cuda(ablate_channels_cuda(problem, current_stream(y.get_device_index())), args.op.c_str());
}

Tensor ablate_channels(const Tensor& input, const Tensor& offsets, const Tensor& channels,
                       std::optional<Tensor> baseline, int64_t channel_dim) {
  const AblateChannelsArgs args{"ablate_channels", input, offsets, channels, baseline, channel_dim, false};
  args.check();
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor y = args.make_result();
  if (y.numel() == 0) return y;
  std::vector<int64_t> forks{args.rows() / input.size(0)};
  for (int64_t d = 0; d < input.dim(); ++d) forks.push_back(input.size(d));
  Tensor variants = torch::stable::view(y, torch::headeronly::IntHeaderOnlyArrayRef(forks));
  torch::stable::copy_(variants, input);
  fill(args, y);
  return y;
}

// Returns nothing: what an operator gives back must not share memory with what it is given, for torch.compile.
void ablate_channels_(const Tensor& input, const Tensor& offsets, const Tensor& channels,
                      std::optional<Tensor> baseline, int64_t channel_dim) {
  const AblateChannelsArgs args{"ablate_channels_", input, offsets, channels, baseline, channel_dim, true};
  args.check();
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  fill(args, input);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("ablate_channels", TORCH_BOX(&memloc::ablate_channels));
  m.impl("ablate_channels_", TORCH_BOX(&memloc::ablate_channels_));
}
