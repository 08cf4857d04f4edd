// A switched-off channel behind the next linear layer, on CUDA.
#include <torch/csrc/stable/library.h>

#include "cuda/ablation_tensors.h"

namespace memloc {
namespace {

using torch::stable::Tensor;

Tensor linear_ablation(const Tensor& output, const Tensor& change, const Tensor& weight, const Tensor& channels,
                       std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                       bool relu, std::optional<Tensor> examples) {
  const AblationArgs args{"linear_ablation", output, change, weight, channels, scale, shift, residual, relu, examples};
  args.check_linear();
  return ablation(args, nullptr);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) { m.impl("linear_ablation", TORCH_BOX(&memloc::linear_ablation)); }
