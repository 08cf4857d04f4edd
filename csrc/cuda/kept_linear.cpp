// A linear layer of which each run of rows has some channels, on CUDA: unwraps tensors, guards the device, launches on
// the current stream. Never waits for the device: of the channels' values, which are not looked at, those that a weight
// does not have are taken for zeros.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kept_linear_kernel.h"
#include "cuda/launch.h"
#include "kept_linear_args.h"

namespace memloc {
namespace {

using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;

void run(const KeptLinearArgs& args, KeptResult result) {
  args.check(2, result == KeptResult::kWeight);
  if (args.channels.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(args.values.get_device_index());
  const auto data = [&](const Tensor& t, KeptResult as) {
    return as == result ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  };
  KeptLinear k{};
  k.result = result, k.type = element_type(args.values);
  k.values = data(args.values, KeptResult::kValues), k.dense = data(args.dense, KeptResult::kDense);
  k.weight = data(args.weight, KeptResult::kWeight), k.bias = args.bias ? args.bias->const_data_ptr() : nullptr;
  k.channels = static_cast<const int64_t*>(args.channels.const_data_ptr());
  k.dense_step = args.dense.stride(0), k.weight_step = args.weight.stride(0);
  k.columns = args.dense.size(1), k.weights = args.weight.size(0);
  k.rows = args.rows.data(), k.ends = args.ends.data(), k.runs = args.runs();
  check_cuda(kept_linear_cuda(k, current_stream(args.values.get_device_index())), args.op);
}

void kept_linear(Tensor values, const Tensor& dense, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& channels, Numbers rows, Numbers ends) {
  run({"kept_linear_", values, dense, weight, bias, channels, rows, ends}, KeptResult::kValues);
}

void kept_linear_input(Tensor dense, const Tensor& values, const Tensor& weight, const Tensor& channels, Numbers rows,
                       Numbers ends) {
  run({"kept_linear_input_", values, dense, weight, std::nullopt, channels, rows, ends}, KeptResult::kDense);
}

void kept_linear_weight(Tensor weight, const Tensor& values, const Tensor& dense, const Tensor& channels, Numbers rows,
                        Numbers ends) {
  run({"kept_linear_weight_", values, dense, weight, std::nullopt, channels, rows, ends}, KeptResult::kWeight);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("kept_linear_", TORCH_BOX(&memloc::kept_linear));
  m.impl("kept_linear_input_", TORCH_BOX(&memloc::kept_linear_input));
  m.impl("kept_linear_weight_", TORCH_BOX(&memloc::kept_linear_weight));
}
