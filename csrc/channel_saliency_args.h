// Channel saliency, the side that knows tensors: argument checks, loops and the result, for every device's kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "channel_saliency.h"
#include "check.h"
#include "tensor_text.h"

namespace memloc {

struct ChannelSaliencyArgs {
  torch::stable::Tensor activation, grad;
  int64_t channel_dim;

  int64_t channel() const { return channel_dim < 0 ? channel_dim + activation.dim() : channel_dim; }
  void check() const;
  SaliencyLayout layout() const;
  torch::stable::Tensor result() const;
};

inline void ChannelSaliencyArgs::check() const {
  using torch::headeronly::toString;
  const char* const op = "channel_saliency: ";
  MEMLOC_CHECK(activation.defined(), op, "activation must be a tensor, got None");
  MEMLOC_CHECK(grad.defined(), op, "grad must be a tensor, got None");
  const int64_t dim = activation.dim();
  MEMLOC_CHECK(element_size(activation) != 0, op, "activation must have dtype float16, bfloat16, float32 or float64, ",
               "got ", toString(activation.scalar_type()));
  MEMLOC_CHECK(grad.scalar_type() == activation.scalar_type(), op, "grad must have dtype ",
               toString(activation.scalar_type()), " like activation, got ", toString(grad.scalar_type()));
  MEMLOC_CHECK(on_same_device(grad, activation), op, "grad must be on the device of activation; got grad on ",
               grad.is_cuda() ? "CUDA" : "the CPU", " and activation on ", activation.is_cuda() ? "CUDA" : "the CPU");
  MEMLOC_CHECK(dim >= 2 && dim <= SaliencyLayout::kMaxLoops + 2, op,
               "activation must be [batch, channels, ...] with 2 to ", SaliencyLayout::kMaxLoops + 2,
               " dimensions, got shape ", shape_of(activation));
  MEMLOC_CHECK(channel_dim != 0 && channel_dim > -dim && channel_dim < dim, op,
               "channel_dim must name a dimension of activation after the batch, got ", channel_dim, " for shape ",
               shape_of(activation));
  bool same = grad.dim() == dim;
  for (int64_t d = 0; same && d < dim; ++d) same = grad.size(d) == activation.size(d);
  MEMLOC_CHECK(same, op, "grad must have the shape of activation, ", shape_of(activation), ", got ", shape_of(grad));
}

inline SaliencyLayout ChannelSaliencyArgs::layout() const {
  SaliencyLayout layout;
  for (int64_t d = 0; d < activation.dim(); ++d) {
    const SaliencyLoop loop{activation.size(d), activation.stride(d), grad.stride(d)};
    (d == 0 ? layout.batch : d == channel() ? layout.channel : layout.loop[layout.count++]) = loop;
  }
  layout.simplify();
  return layout;
}

// [batch, channels], float64 for float64, else float32; zeros if there is nothing to sum, else for a kernel to fill.
inline torch::stable::Tensor ChannelSaliencyArgs::result() const {
  using torch::headeronly::ScalarType;
  const std::vector<int64_t> sizes{activation.size(0), activation.size(channel())};
  const ScalarType dtype = element_size(activation) == 8 ? ScalarType::Double : ScalarType::Float;
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes);
  return activation.numel() == 0 ? torch::stable::new_zeros(activation, shape, dtype)
                                 : torch::stable::new_empty(activation, shape, dtype);
}

}  // namespace memloc
