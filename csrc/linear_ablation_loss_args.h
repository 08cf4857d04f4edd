// The loss of a linear classifier for every switched-off feature, the side that knows tensors: argument checks and what
// every device's kernel reads.
//
//   logits[c, b] = W (features[b] with feature c at its baseline) + bias
//                = logits[b] - W[:, c] (features[b, c] - baseline[b, c])
//
// All of it in double: where the switched-off feature outweighs the others, the difference has few of its terms'
// digits.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "linear_ablation_loss.h"
#include "tensor_text.h"

namespace memloc {

struct LinearAblationLossArgs {
  torch::stable::Tensor features, weight;
  std::optional<torch::stable::Tensor> bias;
  torch::stable::Tensor targets, baseline;

  void check() const;
  // A result [features, batch].
  torch::stable::Tensor result(torch::headeronly::ScalarType dtype) const;
  torch::headeronly::ScalarType loss_type() const {
    using torch::headeronly::ScalarType;
    return element_size(features) == 8 ? ScalarType::Double : ScalarType::Float;
  }
};

inline void LinearAblationLossArgs::check() const {
  using torch::headeronly::toString;
  const char* const op = "linear_ablation_loss: ";
  const struct {
    const char* name;
    const torch::stable::Tensor& tensor;
  } floats[] = {{"features", features}, {"weight", weight}, {"bias", bias ? *bias : features}, {"baseline", baseline}};
  for (const auto& [name, tensor] : floats) MEMLOC_CHECK(tensor.defined(), op, name, " must be a tensor, got None");
  MEMLOC_CHECK(targets.defined(), op, "targets must be a tensor, got None");
  MEMLOC_CHECK(element_size(features) != 0, op, "features must have dtype float16, bfloat16, float32 or float64, got ",
               toString(features.scalar_type()));
  for (const auto& [name, tensor] : floats) {
    MEMLOC_CHECK(tensor.scalar_type() == features.scalar_type(), op, name, " must have dtype ",
                 toString(features.scalar_type()), " like features, got ", toString(tensor.scalar_type()));
    MEMLOC_CHECK(on_same_device(tensor, features), op, name, " must be on the device of features");
  }
  MEMLOC_CHECK(targets.scalar_type() == torch::headeronly::ScalarType::Long, op, "targets must have dtype int64, got ",
               toString(targets.scalar_type()));
  MEMLOC_CHECK(on_same_device(targets, features), op, "targets must be on the device of features");
  MEMLOC_CHECK(features.dim() == 2, op, "features must be [batch, features], got shape ", shape_of(features));
  const int64_t batch = features.size(0), count = features.size(1);
  MEMLOC_CHECK(weight.dim() == 2 && weight.size(1) == count, op, "weight must have shape [classes, ", count, "], got ",
               shape_of(weight));
  MEMLOC_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op, "bias must have shape [",
               weight.size(0), "], got ", shape_of(floats[2].tensor));
  MEMLOC_CHECK(targets.dim() == 1 && targets.size(0) == batch, op, "targets must have shape [", batch, "], got ",
               shape_of(targets));
  const bool for_all = baseline.dim() == 1 && baseline.size(0) == count;
  const bool for_each = baseline.dim() == 2 && baseline.size(0) == batch && baseline.size(1) == count;
  MEMLOC_CHECK(for_all || for_each, op, "baseline must have shape [", count, "] or [", batch, ", ", count, "], got ",
               shape_of(baseline));
}

inline torch::stable::Tensor LinearAblationLossArgs::result(torch::headeronly::ScalarType dtype) const {
  const std::vector<int64_t> sizes{features.size(1), features.size(0)};
  return torch::stable::new_empty(features, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// What the kernels read, kept alive; all contiguous.
class LinearAblationLossInputs {
 public:
  explicit LinearAblationLossInputs(const LinearAblationLossArgs& args)
      : features_(wide(args.features)),
        weight_(wide(args.weight)),
        baseline_(wide(args.baseline)),
        logits_(torch::stable::contiguous(torch::stable::matmul(weight_, torch::stable::transpose(features_, 0, 1)))),
        targets_(torch::stable::contiguous(args.targets)) {
    if (args.bias) bias_ = wide(*args.bias);
  }

  LinearAblationLossProblem problem() const {
    return {features_.size(0), features_.size(1),
            weight_.size(0),   data(features_),
            data(weight_),     bias_ ? data(*bias_) : nullptr,
            data(baseline_),   baseline_.dim() == 2 ? features_.size(1) : 0,
            data(logits_),     static_cast<const int64_t*>(targets_.const_data_ptr())};
  }

 private:
  static torch::stable::Tensor wide(const torch::stable::Tensor& t) {
    return torch::stable::contiguous(torch::stable::to(t, torch::headeronly::ScalarType::Double));
  }
  static const double* data(const torch::stable::Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

  torch::stable::Tensor features_, weight_, baseline_, logits_, targets_;
  std::optional<torch::stable::Tensor> bias_;
};

}  // namespace memloc
