// Switched-off channels, seen behind the next layer: argument checks, for every device's kernels.
//
//   conv2d_ablation   y[k, b, o] = act(scale[o] (output[b, o] + conv(change[k, b], weight[o, c_k])) + shift[o] + r)
//   linear_ablation   y[k, b, o] = act(scale[o] (output[b, o] + change[k, b] weight[o, c_k]) + shift[o] + r)
//
// c_k = channels[k]; r = residual[b, o], or residual[k, b, o] if every variant has its own; act = ReLU or nothing.
// Given examples, every variant has a single row of its own, and b = examples[k] in output and in a shared residual.
// Every b has as many positions as the layer gives it. Sums and products are in float, or in double for double.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "conv2d.h"
#include "conv2d_args.h"
#include "tensor_text.h"

namespace memloc {

struct AblationArgs {
  using Tensor = torch::stable::Tensor;
  const char* op;
  Tensor output, change, weight, channels;
  std::optional<Tensor> scale, shift, residual;
  bool relu;
  std::optional<Tensor> examples = {};

  int64_t variants() const { return channels.size(0); }
  int64_t outputs() const { return weight.size(0); }
  bool residual_per_variant() const { return residual && residual->dim() > output.dim(); }
  std::vector<int64_t> result_sizes() const {
    std::vector<int64_t> sizes{variants()};
    for (int64_t d = 0; d < output.dim(); ++d) sizes.push_back(d == 0 && examples ? 1 : output.size(d));
    return sizes;
  }

  void check_linear() const;
  // Returns the axes of the convolution along y and x.
  std::pair<Axis, Axis> check_conv2d(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation) const;

 private:
  void check_tensors() const;
  void check_epilogue() const;
};

inline bool has_shape(const torch::stable::Tensor& t, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes[d];
  return same;
}

// What goes for every tensor, and for channels: how many there are; that each is in range is left to the kernels.
inline void AblationArgs::check_tensors() const {
  const std::pair<const char*, const Tensor*> given[] = {{"output", &output},
                                                         {"change", &change},
                                                         {"weight", &weight},
                                                         {"channels", &channels},
                                                         {"scale", scale ? &*scale : nullptr},
                                                         {"shift", shift ? &*shift : nullptr},
                                                         {"residual", residual ? &*residual : nullptr},
                                                         {"examples", examples ? &*examples : nullptr}};
  for (const auto& [name, tensor] : given) {
    if (tensor == nullptr) continue;
    MEMLOC_CHECK(tensor->defined(), op, ": ", name, " must be a tensor, got None");
    if (tensor == &output) {
      MEMLOC_CHECK(element_size(output) != 0, op,
                   ": output must have dtype float16, bfloat16, float32 or float64, got ",
                   torch::headeronly::toString(output.scalar_type()));
    } else if (tensor == &channels || (examples && tensor == &*examples)) {
      MEMLOC_CHECK(tensor->scalar_type() == torch::headeronly::ScalarType::Long, op, ": ", name,
                   " must have dtype int64, got ", torch::headeronly::toString(tensor->scalar_type()));
    } else {
      MEMLOC_CHECK(tensor->scalar_type() == output.scalar_type(), op, ": ", name, " must have dtype ",
                   torch::headeronly::toString(output.scalar_type()), " like output, got ",
                   torch::headeronly::toString(tensor->scalar_type()));
    }
    MEMLOC_CHECK(on_same_device(*tensor, output), op, ": ", name, " must be on the device of output");
  }
  MEMLOC_CHECK(channels.dim() == 1, op, ": channels must have shape [variants], got ", shape_of(channels));
  MEMLOC_CHECK(!examples || has_shape(*examples, {variants()}), op, ": examples must have shape [", variants(),
               "] like channels, got ", shape_of(*examples));
  MEMLOC_CHECK(!examples || variants() == 0 || (output.dim() > 0 && output.size(0) > 0), op,
               ": output must have at least one example, got ", shape_of(output));
}

inline void AblationArgs::check_epilogue() const {
  for (const auto& [name, tensor] : {std::pair{"scale", &scale}, std::pair{"shift", &shift}}) {
    MEMLOC_CHECK(!*tensor || has_shape(**tensor, {outputs()}), op, ": ", name, " must have shape [", outputs(),
                 "], got ", shape_of(**tensor));
  }
  MEMLOC_CHECK(!residual || has_shape(*residual, result_sizes()) ||
                   (residual->dim() == output.dim() && shape_of(*residual) == shape_of(output)),
               op, ": residual must be shaped like output or like the result, [", variants(), ", *", shape_of(output),
               "], got ", shape_of(*residual));
}

inline void AblationArgs::check_linear() const {
  check_tensors();
  MEMLOC_CHECK(weight.dim() == 2, op, ": weight must be [out, in], got ", shape_of(weight));
  MEMLOC_CHECK(output.dim() >= 2 && output.size(-1) == outputs(), op, ": output must be [batch, *, ", outputs(),
               "], got ", shape_of(output));
  std::vector<int64_t> sizes = result_sizes();
  sizes.pop_back();
  MEMLOC_CHECK(has_shape(change, sizes), op, ": change must be [variants, batch, *] to go with ", variants(),
               " channels and output ", shape_of(output), ", got ", shape_of(change));
  check_epilogue();
}

inline std::pair<Axis, Axis> AblationArgs::check_conv2d(const std::vector<int64_t>& stride,
                                                        const std::vector<int64_t>& padding,
                                                        const std::vector<int64_t>& dilation) const {
  check_tensors();
  MEMLOC_CHECK(weight.dim() == 4, op, ": weight must be [out, in, height, width], got ", shape_of(weight));
  MEMLOC_CHECK(output.dim() == 4 && output.size(1) == outputs(), op, ": output must be [batch, ", outputs(),
               ", rows, columns], got ", shape_of(output));
  const int64_t batch = examples ? 1 : output.size(0);
  MEMLOC_CHECK(change.dim() == 4 && change.size(0) == variants() && change.size(1) == batch, op,
               ": change must be [variants, ", examples ? "1" : "batch", ", height, width] to go with ", variants(),
               " channels and output ", shape_of(output), ", got ", shape_of(change));
  check_conv2d_numbers(op, change.size(2), change.size(3), {weight.size(2), weight.size(3)}, stride, padding, dilation);
  const Axis y{change.size(2), weight.size(2), stride[0], padding[0], dilation[0]};
  const Axis x{change.size(3), weight.size(3), stride[1], padding[1], dilation[1]};
  MEMLOC_CHECK(y.valid() && x.valid() && output.size(2) == y.positions() && output.size(3) == x.positions(), op,
               ": output must be the convolution's, got ", shape_of(output), " for change ", shape_of(change),
               " and kernel ", weight.size(2), " x ", weight.size(3));
  check_epilogue();
  return {y, x};
}

}  // namespace memloc
