// Example-tied dropout, the side that knows tensors: argument checks and the loops over x, for every device's kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <string>

#include "check.h"
#include "example_tied_dropout.h"
#include "tensor_text.h"

namespace memloc {

struct ExampleTiedDropoutArgs {
  torch::stable::Tensor x, example_ids;
  int64_t num_generalization;
  double p_mem;
  int64_t seed, site, channel_dim;

  int64_t channel() const { return channel_dim < 0 ? channel_dim + x.dim() : channel_dim; }
  void check() const;
  TiedMask mask() const;
  Layout layout(const torch::stable::Tensor& y) const;
};

inline void ExampleTiedDropoutArgs::check() const {
  const char* const op = "example_tied_dropout: ";
  MEMLOC_CHECK(x.defined(), op, "x must be a tensor, got None");
  MEMLOC_CHECK(example_ids.defined(), op, "example_ids must be a tensor, got None");
  MEMLOC_CHECK(element_size(x) != 0, op, "x must have dtype float16, bfloat16, float32 or float64, got ",
               torch::headeronly::toString(x.scalar_type()));
  MEMLOC_CHECK(example_ids.scalar_type() == torch::headeronly::ScalarType::Long, op,
               "example_ids must have dtype int64, got ", torch::headeronly::toString(example_ids.scalar_type()));
  MEMLOC_CHECK(x.dim() >= 2 && x.dim() <= Layout::kMaxLoops, op,
               "x must be [batch, channels, ...] with 2 to 25 dimensions, got shape ", shape_of(x));
  MEMLOC_CHECK(channel_dim != 0 && channel_dim != -x.dim() && channel_dim >= -x.dim() && channel_dim < x.dim(), op,
               "channel_dim must name a dimension of x after the batch, got ", channel_dim, " for shape ", shape_of(x));
  const int64_t channels = x.size(channel());
  const bool last = channel() == x.dim() - 1;
  const bool per_row = example_ids.dim() == 1 && example_ids.size(0) == x.size(0);
  const bool per_token = example_ids.dim() == 2 && x.dim() > 2 && last && example_ids.size(0) == x.size(0) &&
                         example_ids.size(1) == x.size(1);
  MEMLOC_CHECK(per_row || per_token, op, "example_ids must have shape [", x.size(0), "]",
               x.dim() > 2 && last
                   ? ", or one id per token, [" + std::to_string(x.size(0)) + ", " + std::to_string(x.size(1)) + "]"
                   : "",
               ", to go with x of shape ", shape_of(x), ", got ", shape_of(example_ids));
  MEMLOC_CHECK(on_same_device(example_ids, x), op, "example_ids must be on the device of x; got ids on ",
               example_ids.is_cuda() ? "CUDA" : "the CPU", " and x on ", x.is_cuda() ? "CUDA" : "the CPU");
  MEMLOC_CHECK(num_generalization >= 0 && num_generalization <= channels, op, "num_generalization must be in [0, ",
               channels, "], got ", num_generalization);
  MEMLOC_CHECK(p_mem >= 0 && p_mem <= 1, op, "p_mem must be in [0, 1], got ", p_mem);  // false for NaN too
  MEMLOC_CHECK(site >= 0 && site <= UINT32_MAX, op, "site must be in [0, 4294967295], got ", site);
}

inline TiedMask ExampleTiedDropoutArgs::mask() const {
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(site), num_generalization,
          static_cast<uint64_t>(std::ceil(std::ldexp(p_mem, 32)))};
}

inline Layout ExampleTiedDropoutArgs::layout(const torch::stable::Tensor& y) const {
  Layout layout;
  layout.count = static_cast<int>(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) {
    const int64_t id = d < example_ids.dim() ? example_ids.stride(d) : 0;
    layout.loop[d] = {x.size(d), x.stride(d), y.stride(d), id, d == channel() ? 1 : 0};
  }
  layout.simplify();
  return layout;
}

}  // namespace memloc
