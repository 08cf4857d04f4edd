// A linear layer of which each run of rows has some channels, the side that knows tensors: argument checks.
//
//   values_r = weight[channels_r] @ dense[rows_r].T + bias[channels_r]
//
// for each run r. A run's rows follow those of the run before it, as its channels do, and its values,
// [channels_r][rows_r]. A run's channels ascend. rows and ends say where each run's rows and channels end, after a
// first 0.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "tensor_text.h"

namespace memloc {

struct KeptLinearArgs {
  const char* op;
  torch::stable::Tensor values, dense, weight;
  std::optional<torch::stable::Tensor> bias;
  torch::stable::Tensor channels;
  std::vector<int64_t> rows, ends;

  int64_t runs() const { return static_cast<int64_t>(rows.size()) - 1; }
  // smallest: bytes of an element that the device's kernels know, 2 or 4. A weight that is added to is float32 where
  // elements have 2.
  void check(int smallest, bool adds_to_weight) const;
};

inline void KeptLinearArgs::check(int smallest, bool adds_to_weight) const {
  using torch::headeronly::ScalarType;
  using torch::headeronly::toString;
  using torch::stable::Tensor;
  MEMLOC_CHECK(values.defined(), op, ": values must be a tensor, got None");
  const ScalarType type = values.scalar_type();
  MEMLOC_CHECK(element_size(values) >= smallest, op, ": values must have dtype ",
               smallest == 2 ? "float16, bfloat16, " : "", "float32 or float64, got ", toString(type));
  const auto check_tensor = [&](const Tensor& t, const char* name, int64_t dims) {
    MEMLOC_CHECK(t.defined(), op, ": ", name, " must be a tensor, got None");
    const bool sums = adds_to_weight && &t == &weight && element_size(values) == 2;
    MEMLOC_CHECK(t.scalar_type() == (sums ? ScalarType::Float : type), op, ": ", name, " must have dtype ",
                 toString(sums ? ScalarType::Float : type), sums ? ", in which it is added up" : ", that of values",
                 ", got ", toString(t.scalar_type()));
    MEMLOC_CHECK(on_same_device(t, values), op, ": ", name, " must be on the device of values");
    MEMLOC_CHECK(t.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got shape ", shape_of(t));
    MEMLOC_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, op, ": ", name,
                 " must have its last dimension dense in memory");
  };
  check_tensor(values, "values", 1), check_tensor(dense, "dense", 2), check_tensor(weight, "weight", 2);
  if (bias) check_tensor(*bias, "bias", 1);
  MEMLOC_CHECK(weight.size(1) == dense.size(1), op, ": weight must have as many columns as dense, ", dense.size(1),
               ", got ", weight.size(1));
  MEMLOC_CHECK(!bias || bias->size(0) == weight.size(0), op, ": bias must have shape [", weight.size(0), "]");
  MEMLOC_CHECK(channels.defined(), op, ": channels must be a tensor, got None");
  MEMLOC_CHECK(channels.scalar_type() == ScalarType::Long, op, ": channels must have dtype int64, got ",
               toString(channels.scalar_type()));
  MEMLOC_CHECK(on_same_device(channels, values), op, ": channels must be on the device of values");
  MEMLOC_CHECK(channels.dim() == 1 && (channels.numel() <= 1 || channels.stride(0) == 1), op,
               ": channels must have one dimension, dense in memory, got shape ", shape_of(channels));
  const auto check_ends = [&](const std::vector<int64_t>& of, const char* name, int64_t last) {
    bool sorted = !of.empty() && of.front() == 0 && of.back() == last && of.size() == rows.size();
    for (size_t r = 1; sorted && r < of.size(); ++r) sorted = of[r - 1] <= of[r];
    MEMLOC_CHECK(sorted, op, ": ", name, " must ascend from 0 to ", last, ", as many numbers as rows has");
  };
  check_ends(rows, "rows", dense.size(0)), check_ends(ends, "ends", channels.size(0));
  int64_t total = 0;
  for (int64_t r = 0; r < runs(); ++r) total += (rows[r + 1] - rows[r]) * (ends[r + 1] - ends[r]);
  MEMLOC_CHECK(values.numel() == total, op, ": values must have ", total, " elements, got ", values.numel());
}

}  // namespace memloc
