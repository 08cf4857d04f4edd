// Switched-off channels on CUDA: from tensors to a kernel's problem. Never waits for the device, so that it can be
// captured in a graph; for that reason a channel that does not exist is not refused but has no weights.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "ablation_args.h"
#include "cuda/ablation_kernel.h"
#include "cuda/launch.h"

namespace memloc {

// axes: of a convolution; null of a linear layer.
inline torch::stable::Tensor ablation(const AblationArgs& args, const std::pair<Axis, Axis>* axes) {
  using torch::stable::Tensor;
  const torch::stable::accelerator::DeviceGuard guard(args.output.get_device_index());
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const std::vector<int64_t> sizes = args.result_sizes();
  const Tensor result = torch::stable::new_empty(args.output, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  if (result.numel() == 0) return result;
  const Tensor output = dense(args.output), change = dense(args.change), channels = dense(args.channels);
  const Tensor scale = args.scale ? dense(*args.scale) : output, shift = args.shift ? dense(*args.shift) : output;
  const Tensor residual = args.residual ? dense(*args.residual) : output;
  const Tensor examples = args.examples ? dense(*args.examples) : channels;
  const Tensor& weight = args.weight;

  AblationProblem problem{};
  problem.type = element_type(output);
  problem.result = result.mutable_data_ptr();
  problem.output = output.const_data_ptr();
  problem.residual = args.residual ? residual.const_data_ptr() : nullptr;
  problem.residual_step = args.residual_per_variant() ? result.numel() / args.variants() : 0;
  problem.examples = args.examples ? static_cast<const int64_t*>(examples.const_data_ptr()) : nullptr;
  problem.examples_end = output.size(0);
  problem.change = change.const_data_ptr();
  problem.weight = weight.const_data_ptr();
  problem.weight_output = weight.stride(0);
  problem.weight_input = weight.stride(1);
  problem.weight_row = axes ? weight.stride(2) : 0;
  problem.weight_column = axes ? weight.stride(3) : 0;
  problem.channels = static_cast<const int64_t*>(channels.const_data_ptr());
  problem.scale = args.scale ? scale.const_data_ptr() : nullptr;
  problem.shift = args.shift ? shift.const_data_ptr() : nullptr;
  problem.variants = args.variants();
  problem.outputs = args.outputs();
  problem.inputs = weight.size(1);
  problem.batch = axes ? change.size(1) : change.numel() / args.variants();
  if (axes) problem.y = axes->first, problem.x = axes->second;
  problem.relu = args.relu;
  const cudaStream_t stream = current_stream(output.get_device_index());
  check_cuda(axes ? conv2d_ablation_cuda(problem, stream) : linear_ablation_cuda(problem, stream), args.op);
  return result;
}

}  // namespace memloc
