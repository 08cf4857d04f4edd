// A convolution that reads some input channels of each example, and its gradients: argument checks.
//
//   y[b] = conv2d(where(keep[b], x[b], 0), weight) + bias
//
// Channels that an example does not keep are not read: what they hold, infinite or not a number, reaches no result.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "conv2d.h"
#include "conv2d_args.h"
#include "tensor_text.h"

namespace memloc {

struct KeptConv2dGeometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

struct KeptConv2dShape {
  int64_t batch, groups, inputs, outputs;  // inputs and outputs of one group
  Axis y, x;

  int64_t offsets() const { return y.kernel * x.kernel; }
  int64_t positions() const { return y.positions() * x.positions(); }
};

// A tensor of the operator, of the dtype of the one that is called `first`.
inline void check_kept_tensor(const char* op, const char* name, const torch::stable::Tensor& t, int64_t dim,
                              const char* sizes, const char* first, const torch::stable::Tensor& like) {
  MEMLOC_CHECK(t.defined() && like.defined(), op, ": ", t.defined() ? first : name, " must be a tensor, got None");
  MEMLOC_CHECK(element_size(like) != 0, op, ": ", first, " must have dtype float16, bfloat16, float32 or float64, got ",
               torch::headeronly::toString(like.scalar_type()));
  MEMLOC_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have dtype ",
               torch::headeronly::toString(like.scalar_type()), " like ", first, ", got ",
               torch::headeronly::toString(t.scalar_type()));
  MEMLOC_CHECK(t.dim() == dim, op, ": ", name, " must be ", sizes, ", got ", shape_of(t));
  MEMLOC_CHECK(on_same_device(t, like), op, ": ", name, " must be on the device of ", first);
}

// Of images [batch, in, height, width] and filters [out, in / groups, height, width].
inline KeptConv2dShape kept_conv2d_shape(const char* op, const std::vector<int64_t>& image,
                                         const std::vector<int64_t>& filters, const KeptConv2dGeometry& geometry,
                                         const torch::stable::Tensor& keep, const torch::stable::Tensor& like) {
  const int64_t groups = geometry.groups;
  MEMLOC_CHECK(keep.defined(), op, ": keep must be a tensor, got None");
  MEMLOC_CHECK(keep.scalar_type() == torch::headeronly::ScalarType::Bool, op, ": keep must have dtype bool, got ",
               torch::headeronly::toString(keep.scalar_type()));
  MEMLOC_CHECK(on_same_device(keep, like), op, ": keep must be on the device of the other tensors");
  MEMLOC_CHECK(keep.dim() == 2 && keep.size(0) == image[0] && keep.size(1) == image[1], op, ": keep must have shape [",
               image[0], ", ", image[1], "], got ", shape_of(keep));
  MEMLOC_CHECK(groups >= 1 && image[1] % groups == 0 && filters[0] % groups == 0, op, ": groups must divide the ",
               image[1], " input and ", filters[0], " output channels, got ", groups);
  MEMLOC_CHECK(filters[1] == image[1] / groups, op, ": weight must have ", image[1] / groups,
               " input channels per group, got ", filters[1]);
  MEMLOC_CHECK(filters[0] > 0 && filters[1] > 0, op, ": weight must have at least one output and input channel, got ",
               filters[0], " and ", filters[1]);
  check_conv2d_numbers(op, image[2], image[3], {filters[2], filters[3]}, geometry.stride, geometry.padding,
                       geometry.dilation);
  const auto axis = [&](int i) {
    return Axis{image[2 + i], filters[2 + i], geometry.stride[i], geometry.padding[i], geometry.dilation[i]};
  };
  const KeptConv2dShape shape{image[0], groups, image[1] / groups, filters[0] / groups, axis(0), axis(1)};
  MEMLOC_CHECK(shape.y.valid() && shape.x.valid(), op, ": a kernel of ", filters[2], " x ", filters[3],
               " with dilation ", geometry.dilation[0], " x ", geometry.dilation[1],
               " must fit into the padded image of ", image[2] + 2 * geometry.padding[0], " x ",
               image[3] + 2 * geometry.padding[1]);
  // below this every size in bytes fits, and no machine has more
  const double padded = (image[2] + 2.0 * geometry.padding[0] + geometry.stride[0]) *
                        (image[3] + 2.0 * geometry.padding[1] + geometry.stride[1]);
  const double scratch =
      shape.inputs * padded + (shape.outputs + 64.0) * (padded + 1.0 * shape.inputs * shape.offsets());
  MEMLOC_CHECK(scratch < 1e12, op, ": sizes of one example must leave less than 10^12 elements of scratch, got ",
               scratch);
  return shape;
}

inline std::vector<int64_t> sizes_of(const torch::stable::Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

inline KeptConv2dShape check_kept_conv2d(const torch::stable::Tensor& x, const torch::stable::Tensor& keep,
                                         const torch::stable::Tensor& weight,
                                         const std::optional<torch::stable::Tensor>& bias,
                                         const KeptConv2dGeometry& geometry) {
  const char* const op = "kept_conv2d";
  check_kept_tensor(op, "x", x, 4, "[batch, in, height, width]", "x", x);
  check_kept_tensor(op, "weight", weight, 4, "[out, in / groups, height, width]", "x", x);
  if (bias) check_kept_tensor(op, "bias", *bias, 1, "[out]", "x", x);
  MEMLOC_CHECK(!bias || bias->size(0) == weight.size(0), op, ": bias must have shape [", weight.size(0), "], got ",
               shape_of(*bias));
  return kept_conv2d_shape(op, sizes_of(x), sizes_of(weight), geometry, keep, x);
}

inline void check_kept_grad(const char* op, const torch::stable::Tensor& grad, const KeptConv2dShape& s) {
  const std::vector<int64_t> sizes{s.batch, s.groups * s.outputs, s.y.positions(), s.x.positions()};
  MEMLOC_CHECK(sizes_of(grad) == sizes, op, ": grad must have shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
               sizes[3], "], got ", shape_of(grad));
}

inline KeptConv2dShape check_kept_input_grad(const torch::stable::Tensor& grad, const torch::stable::Tensor& keep,
                                             const torch::stable::Tensor& weight,
                                             const std::vector<int64_t>& input_size,
                                             const KeptConv2dGeometry& geometry) {
  const char* const op = "kept_conv2d_input_grad";
  check_kept_tensor(op, "grad", grad, 4, "[batch, out, rows, columns]", "grad", grad);
  check_kept_tensor(op, "weight", weight, 4, "[out, in / groups, height, width]", "grad", grad);
  MEMLOC_CHECK(input_size.size() == 2, op, ": input_size must be two numbers, got ", input_size.size());
  MEMLOC_CHECK(keep.defined() && keep.dim() == 2, op, ": keep must be a tensor of shape [batch, in]");
  const std::vector<int64_t> image{grad.size(0), keep.size(1), input_size[0], input_size[1]};
  const KeptConv2dShape s = kept_conv2d_shape(op, image, sizes_of(weight), geometry, keep, grad);
  check_kept_grad(op, grad, s);
  return s;
}

inline KeptConv2dShape check_kept_weight_grad(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                                              const torch::stable::Tensor& keep,
                                              const std::vector<int64_t>& kernel_size,
                                              const KeptConv2dGeometry& geometry) {
  const char* const op = "kept_conv2d_weight_grad";
  check_kept_tensor(op, "x", x, 4, "[batch, in, height, width]", "x", x);
  check_kept_tensor(op, "grad", grad, 4, "[batch, out, rows, columns]", "x", x);
  MEMLOC_CHECK(kernel_size.size() == 2, op, ": kernel_size must be two numbers, got ", kernel_size.size());
  const int64_t inputs = x.size(1) / std::max<int64_t>(1, geometry.groups);
  const std::vector<int64_t> filters{grad.size(1), inputs, kernel_size[0], kernel_size[1]};
  const KeptConv2dShape s = kept_conv2d_shape(op, sizes_of(x), filters, geometry, keep, x);
  check_kept_grad(op, grad, s);
  return s;
}

}  // namespace memloc
