// A switched-off channel behind the next convolution, on the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/ablation_tensors.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

Tensor conv2d_ablation(const Tensor& output, const Tensor& change, const Tensor& weight, const Tensor& channels,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                       bool relu, std::optional<Tensor> examples) {
  const AblationArgs args{"conv2d_ablation", output, change, weight, channels, scale, shift, residual, relu, examples};
  const std::pair<Axis, Axis> axes = args.check_conv2d(stride, padding, dilation);
  return ablation(args, &axes);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) { m.impl("conv2d_ablation", TORCH_BOX(&memloc::conv2d_ablation)); }
