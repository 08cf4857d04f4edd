// Many layers accounted in one call: squared norms of each example's gradient of every parameter, and the sums of the
// gradients. This is the side that knows tensors: what a layer is, and argument checks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "grad_sqnorm_args.h"
#include "tensor_text.h"

namespace memloc {

// A layer, of kNumbers numbers. A linear layer and a layer normalisation see tokens: the last `own` dimensions are
// features, and index (i * batch + b) * after + j of dimension `dim` belongs to example b. The others see images
// [batch, channels, *].
struct AccountLayer {
  enum Kind { kLinear, kConvolution, kLayerNorm, kChannelNorm, kKinds };
  static constexpr int64_t kNumbers = 15;

  int64_t kind, parameters;  // 1: a weight, 2: a bias, 3: both
  int64_t dim, before, after;
  int64_t own;  // of kChannelNorm: groups of channels with statistics by example, or 0: they are by channel
  std::vector<int64_t> kernel, stride, padding, dilation;
  int64_t groups;
  double eps;  // of kChannelNorm: its second statistic is a variance, to which this is added; below 0: it is 1 / std

  AccountLayer(const int64_t* n, double eps)
      : kind(n[0]),
        parameters(n[1]),
        dim(n[2]),
        before(n[3]),
        after(n[4]),
        own(n[5]),
        kernel{n[6], n[7]},
        stride{n[8], n[9]},
        padding{n[10], n[11]},
        dilation{n[12], n[13]},
        groups(n[14]),
        eps(eps) {}

  bool weight() const { return parameters & 1; }
  bool bias() const { return parameters & 2; }
  bool tokens() const { return kind == kLinear || kind == kLayerNorm; }
  bool normalization() const { return kind == kLayerNorm || kind == kChannelNorm; }
};

// A convolution's operand as [batch, channels, height, width].
inline torch::stable::Tensor planar(const torch::stable::Tensor& t) {
  return t.dim() == 3 ? torch::stable::unsqueeze(t, 2) : t;
}

// Checks a layer, and returns the number of its examples.
inline int64_t check_account_layer(const AccountLayer& l, const torch::stable::Tensor& x,
                                   const torch::stable::Tensor& g) {
  const char* const op = "account";
  check_pair(op, x, g);
  MEMLOC_CHECK(l.kind >= 0 && l.kind < AccountLayer::kKinds, op, ": a kind of layer must be in [0, 4), got ", l.kind);
  MEMLOC_CHECK(l.parameters >= 1 && l.parameters <= 3, op, ": parameters must be in [1, 3], got ", l.parameters);
  if (l.kind == AccountLayer::kConvolution) {
    conv2d_shape(op, planar(x), planar(g), l.kernel, l.stride, l.padding, l.dilation, l.groups);
    return g.size(0);
  }
  bool same = x.dim() == g.dim() && g.dim() >= 2;
  for (int64_t d = 0; same && d < g.dim() - (l.kind == AccountLayer::kLinear); ++d) same = x.size(d) == g.size(d);
  MEMLOC_CHECK(same, op, ": inputs and grad_outputs must go together, got ", shape_of(x), " and ", shape_of(g));
  if (!l.tokens()) {
    MEMLOC_CHECK(l.own >= 0 && (l.own == 0 || g.size(1) % l.own == 0), op, ": groups must divide the ", g.size(1),
                 " channels, got ", l.own);
    return g.size(0);
  }
  const bool single = l.own == 1 || !(l.kind == AccountLayer::kLinear && l.weight());
  MEMLOC_CHECK(l.own >= 1 && l.own < g.dim() && single && l.dim >= 0 && l.dim < g.dim() - l.own, op,
               ": features must be the last dimensions, behind that of the examples, got ", l.own, " and ", l.dim,
               " for shape ", shape_of(g));
  const int64_t size = g.size(l.dim);
  MEMLOC_CHECK(l.before >= 1 && l.after >= 1 && size % l.before == 0 && size / l.before % l.after == 0, op,
               ": parts before and behind the examples must divide ", size, ", got ", l.before, " and ", l.after);
  return size / l.before / l.after;
}

// Checks a statistic of a normalisation of what g is the gradient of.
inline void check_account_statistic(const AccountLayer& l, const torch::stable::Tensor& t,
                                    const torch::stable::Tensor& g) {
  using torch::headeronly::ScalarType;
  const char* const op = "account";
  MEMLOC_CHECK(t.defined() && t.is_cpu() == g.is_cpu() && on_same_device(t, g), op,
               ": statistics must be on the device of inputs");
  const ScalarType dtype = g.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  MEMLOC_CHECK(t.scalar_type() == dtype, op, ": statistics must have dtype ", torch::headeronly::toString(dtype),
               ", got ", torch::headeronly::toString(t.scalar_type()));
  bool same = t.is_contiguous();
  if (l.kind == AccountLayer::kLayerNorm) {
    same = same && t.dim() == g.dim();
    for (int64_t d = 0; same && d < g.dim(); ++d) same = t.size(d) == (d < g.dim() - l.own ? g.size(d) : 1);
  } else {
    same = same && t.numel() == (l.own ? g.size(0) * l.own : g.size(1));
  }
  MEMLOC_CHECK(same, op, ": statistics must be contiguous and go with ", shape_of(g), ", got ", shape_of(t));
}

}  // namespace memloc
