// Rows with channels switched off: argument checks and the result's memory, for every device's kernels.
//
//   y[r, c, s] = baseline[c]  if c is one of channels[offsets[r] .. offsets[r + 1])  else x[r % B, c, s]
//
// Values move as bits, so nothing here depends on the dtype but its width.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "layout.h"
#include "tensor_text.h"

namespace memloc {

struct AblateChannelsArgs {
  using Tensor = torch::stable::Tensor;
  std::string op;
  Tensor input, offsets, channels;
  std::optional<Tensor> baseline;
  int64_t channel_dim;
  bool in_place;

  int64_t channel() const { return channel_dim < 0 ? channel_dim + input.dim() : channel_dim; }
  int64_t rows() const { return offsets.size(0) - 1; }
  int64_t num_channels() const { return input.size(channel()); }
  void check() const;
  Tensor make_result() const;
};

inline void AblateChannelsArgs::check() const {
  MEMLOC_CHECK(input.defined(), op, ": input must be a tensor, got None");
  MEMLOC_CHECK(element_size(input) != 0, op, ": input must have dtype float16, bfloat16, float32 or float64, got ",
               torch::headeronly::toString(input.scalar_type()));
  for (const auto& [name, tensor] : {std::pair{"offsets", &offsets}, std::pair{"channels", &channels}}) {
    MEMLOC_CHECK(tensor->defined(), op, ": ", name, " must be a tensor, got None");
    MEMLOC_CHECK(tensor->scalar_type() == torch::headeronly::ScalarType::Long, op, ": ", name,
                 " must have dtype int64, got ", torch::headeronly::toString(tensor->scalar_type()));
    MEMLOC_CHECK(tensor->dim() == 1, op, ": ", name, " must have one dimension, got shape ", shape_of(*tensor));
    MEMLOC_CHECK(on_same_device(*tensor, input), op, ": ", name, " must be on the device of input");
  }
  MEMLOC_CHECK(input.dim() >= 2 && input.dim() < Layout::kMaxLoops, op,
               ": input must be [batch, channels, ...] with 2 to 24 dimensions, got shape ", shape_of(input));
  MEMLOC_CHECK(
      channel_dim != 0 && channel_dim != -input.dim() && channel_dim >= -input.dim() && channel_dim < input.dim(), op,
      ": channel_dim must name a dimension of input after the batch, got ", channel_dim, " for shape ",
      shape_of(input));
  MEMLOC_CHECK(offsets.size(0) >= 1, op, ": offsets must have one element more than there are rows, got none");
  const int64_t batch = input.size(0);
  MEMLOC_CHECK(!in_place || rows() == batch, op, ": offsets must have ", batch + 1, " elements, one more than the ",
               batch, " rows of input, got ", offsets.size(0));
  MEMLOC_CHECK(in_place || (batch == 0 ? rows() == 0 : rows() > 0 && rows() % batch == 0), op,
               ": offsets must have one element more than a multiple of the ", batch, " rows of input, got ",
               offsets.size(0));
  if (baseline) {
    MEMLOC_CHECK(baseline->scalar_type() == input.scalar_type(), op, ": baseline must have dtype ",
                 torch::headeronly::toString(input.scalar_type()), " like input, got ",
                 torch::headeronly::toString(baseline->scalar_type()));
    MEMLOC_CHECK(baseline->dim() == 1 && baseline->size(0) == num_channels(), op, ": baseline must have shape [",
                 num_channels(), "], got ", shape_of(*baseline));
    MEMLOC_CHECK(on_same_device(*baseline, input), op, ": baseline must be on the device of input");
  }
  for (int64_t d = 0; in_place && d < input.dim(); ++d) {
    MEMLOC_CHECK(input.size(d) < 2 || input.stride(d) != 0, op, ": input must not be expanded, got stride 0 along ", d);
  }
}

// Rows are outermost; each lies in memory as one of the input's does, without gaps.
inline torch::stable::Tensor AblateChannelsArgs::make_result() const {
  using torch::stable::detail::from;
  if (rows() == 0) return torch::stable::empty_like(input);
  const Tensor row = torch::stable::empty_like(torch::stable::select(input, 0, 0));
  std::vector<int64_t> sizes{rows()}, strides{row.numel()};
  for (int64_t d = 0; d < row.dim(); ++d) sizes.push_back(row.size(d)), strides.push_back(row.stride(d));
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes), steps(strides);
  std::array<StableIValue, 7> stack{from(input),
                                    from(shape),
                                    from(steps),
                                    from(std::optional<torch::headeronly::ScalarType>()),
                                    from(std::optional<torch::headeronly::Layout>()),
                                    from(std::optional<torch::stable::Device>()),
                                    from(std::optional<bool>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace memloc
