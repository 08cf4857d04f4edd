// Switched-off channels on the CPU: from tensors to a kernel's problem, and the kernels of this machine. Those are in
// ablation_kernels.inc, compiled once per instruction set (ablation_*.cpp).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "ablation_args.h"
#include "cpu/ablation_kernels.h"
#include "cpu/element_types.h"
#include "cpu/instruction_set.h"
#include "cpu/simd.h"

namespace memloc {

template <typename Source>
AblationKernels<Source> ablation_kernels() {
  return for_this_machine([](auto set) { return ablation_kernels<set.value, Source>(); });
}

inline void check_channels(const AblationArgs& args) {
  const int64_t* const channels = static_cast<const int64_t*>(args.channels.const_data_ptr());
  for (int64_t k = 0; k < args.variants(); ++k) {
    const int64_t channel = channels[k * args.channels.stride(0)];
    MEMLOC_CHECK(channel >= 0 && channel < args.weight.size(1), args.op, ": channels must be in [0, ",
                 args.weight.size(1), "), got ", channel);
  }
  for (int64_t k = 0; args.examples && k < args.variants(); ++k) {
    const int64_t example = static_cast<const int64_t*>(args.examples->const_data_ptr())[k * args.examples->stride(0)];
    MEMLOC_CHECK(example >= 0 && example < args.output.size(0), args.op, ": examples must be in [0, ",
                 args.output.size(0), "), got ", example);
  }
}

template <typename Source>
const Source* data_of(const torch::stable::Tensor& t) {
  return static_cast<const Source*>(t.const_data_ptr());
}

// A factor or term for every output, as what is computed in, and zeros up to a whole vector.
template <typename Source, typename E>
std::vector<E> per_output(const std::optional<torch::stable::Tensor>& t, E otherwise, int64_t outputs, int64_t lanes) {
  std::vector<E> values(divide_up(outputs, lanes) * lanes);
  for (int64_t o = 0; o < outputs; ++o) {
    values[o] = t ? static_cast<E>(data_of<Source>(*t)[o * t->stride(0)]) : otherwise;
  }
  return values;
}

// Every variant's filters, [panels][kernel offsets][lanes], zero padded; a linear layer has a single offset.
template <typename Source, typename E>
std::vector<E> pack_filters(const AblationArgs& args, int64_t lanes) {
  const torch::stable::Tensor& w = args.weight;
  const bool conv2d = w.dim() == 4;
  const int64_t ky = conv2d ? w.size(2) : 1, kx = conv2d ? w.size(3) : 1;
  const int64_t y = conv2d ? w.stride(2) : 0, x = conv2d ? w.stride(3) : 0;
  const int64_t* const channels = data_of<int64_t>(args.channels);
  const int64_t step = divide_up(args.outputs(), lanes) * lanes * ky * kx, o_step = w.stride(0);
  std::vector<E> filters(args.variants() * step);
  const auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Source* from = data_of<Source>(w) + channels[k * args.channels.stride(0)] * w.stride(1);
      E* to = filters.data() + k * step;
      for (int64_t left = args.outputs(); left > 0; left -= lanes, from += lanes * o_step, to += lanes * ky * kx) {
        for (int64_t o = 0; o < std::min(left, lanes); ++o) {
          E* next = to + o;
          for (int64_t i = 0; i < ky; ++i) {
            const Source* const row = from + o * o_step + i * y;
            for (int64_t j = 0; j < kx; ++j, next += lanes) *next = static_cast<E>(row[j * x]);
          }
        }
      }
    }
  };
  torch::stable::parallel_for(0, args.variants(), std::max<int64_t>(1, 4096 / std::max<int64_t>(1, step)), pack);
  return filters;
}

template <typename Source>
void run_ablation(const AblationArgs& args, const std::pair<Axis, Axis>* axes, const torch::stable::Tensor& result) {
  using E = typename ComputeIn<Source>::type;
  using torch::stable::contiguous;
  const AblationKernels<Source> way = ablation_kernels<Source>();
  const int64_t outputs = args.outputs(), bytes = result.numel() * static_cast<int64_t>(sizeof(Source));
  const torch::stable::Tensor output = contiguous(args.output), change = contiguous(args.change);
  const torch::stable::Tensor residual = args.residual ? contiguous(*args.residual) : output;
  const torch::stable::Tensor examples = args.examples ? contiguous(*args.examples) : output;
  const std::vector<E> scale = per_output<Source, E>(args.scale, 1, outputs, way.lanes);
  const std::vector<E> shift = per_output<Source, E>(args.shift, 0, outputs, way.lanes);
  const std::vector<E> filters = pack_filters<Source, E>(args, axes ? way.tile_rows : way.lanes);

  AblationProblem<Source> problem{};
  problem.result = static_cast<Source*>(result.mutable_data_ptr());
  problem.output = data_of<Source>(output);
  problem.residual = args.residual ? data_of<Source>(residual) : nullptr;
  problem.residual_step = args.residual_per_variant() ? result.numel() / args.variants() : 0;
  problem.examples = args.examples ? data_of<int64_t>(examples) : nullptr;
  problem.change = data_of<Source>(change);
  problem.filters = filters.data();
  problem.filter_step = static_cast<int64_t>(filters.size()) / args.variants();
  problem.scale = scale.data();
  problem.shift = shift.data();
  problem.variants = args.variants();
  problem.batch = axes ? change.size(1) : change.numel() / args.variants();
  problem.outputs = outputs;
  if (axes) problem.y = axes->first, problem.x = axes->second;
  problem.relu = args.relu;
  problem.stream = bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(problem.result) % 64 == 0;

  prefer_huge_pages(problem.result, bytes);
  const int64_t tasks = problem.variants * (axes ? problem.batch : divide_up(problem.batch, kAblationRows));
  const int64_t grain = std::max<int64_t>(1, 32768 * tasks / result.numel());
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    (axes ? way.conv2d : way.linear)(problem, begin, end);
    if (problem.stream) finish_streaming();
  });
}

// axes: of a convolution; null of a linear layer.
inline torch::stable::Tensor ablation(const AblationArgs& args, const std::pair<Axis, Axis>* axes) {
  check_channels(args);
  const std::vector<int64_t> sizes = args.result_sizes();
  const torch::stable::Tensor result =
      torch::stable::new_empty(args.output, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  if (result.numel() == 0) return result;
  with_element(args.output, [&](auto element) { run_ablation<decltype(element)>(args, axes, result); });
  return result;
}

}  // namespace memloc
