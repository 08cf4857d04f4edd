// Per-example gradient norms, the side that knows tensors: argument checks and shapes, for every device's kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "check.h"
#include "conv2d_args.h"
#include "grad_sqnorm.h"
#include "tensor_text.h"

namespace memloc {

inline void check_scratch(const char* op, GradSqnormMethod way, const GradSqnormShape& shape) {
  // below this every size in bytes fits, and no machine has more
  MEMLOC_CHECK(shape.scratch(way) < 1e12, op,
               ": sizes of one example must leave less than 10^12 elements of scratch, got ", shape.scratch(way));
}

// `best` is the device's answer to auto; where a Gram does not fit its scratch, the direct way stands in.
inline GradSqnormMethod parse_method(const char* op, const std::string& method, const char* gram,
                                     const GradSqnormShape& shape, GradSqnormMethod best, bool gram_fits = true) {
  MEMLOC_CHECK(method == "auto" || method == "outer" || method == "direct" || method == gram, op,
               ": method must be auto, outer, direct or ", gram, ", got ", method);
  MEMLOC_CHECK(method != "outer" || shape.outer_applies(), op,
               ": method outer needs a single position, pixel, kernel offset and group");
  const GradSqnormMethod way = method == "auto"                   ? best
                               : method == "outer"                ? GradSqnormMethod::kOuter
                               : method == "direct" || !gram_fits ? GradSqnormMethod::kDirect
                                                                  : GradSqnormMethod::kGram;
  check_scratch(op, way, shape);
  return way;
}

inline void check_pair(const char* op, const torch::stable::Tensor& input, const torch::stable::Tensor& grad_output) {
  MEMLOC_CHECK(input.defined(), op, ": input must be a tensor, got None");
  MEMLOC_CHECK(grad_output.defined(), op, ": grad_output must be a tensor, got None");
  MEMLOC_CHECK(element_size(input) != 0, op, ": input must have dtype float16, bfloat16, float32 or float64, got ",
               torch::headeronly::toString(input.scalar_type()));
  MEMLOC_CHECK(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output must have dtype ",
               torch::headeronly::toString(input.scalar_type()), " like input, got ",
               torch::headeronly::toString(grad_output.scalar_type()));
  MEMLOC_CHECK(on_same_device(grad_output, input), op, ": grad_output must be on the device of input");
}

// input [batch, *, in], grad_output [batch, *, out]
inline GradSqnormShape linear_shape(const char* op, const torch::stable::Tensor& input,
                                    const torch::stable::Tensor& grad_output) {
  check_pair(op, input, grad_output);
  bool same = input.dim() >= 2 && grad_output.dim() == input.dim();
  int64_t positions = 1;
  for (int64_t d = 0; same && d + 1 < input.dim(); ++d) {
    same = input.size(d) == grad_output.size(d);
    if (d > 0) positions *= input.size(d);
  }
  MEMLOC_CHECK(same, op, ": input and grad_output must be [batch, *, in] and [batch, *, out], got ", shape_of(input),
               " and ", shape_of(grad_output));
  MEMLOC_CHECK(positions < int64_t{1} << 31, op, ": an example must have less than 2^31 positions, got ", positions);
  return {1, input.size(-1), grad_output.size(-1), {1, 1, 1, 0, 1}, {positions, 1, 1, 0, 1}};
}

// [batch, *, features] of a linear layer as [batch, features, 1, positions].
inline torch::stable::Tensor image_of(const torch::stable::Tensor& t, const GradSqnormShape& s) {
  const std::vector<int64_t> sizes{t.size(0), 1, s.x.size, t.size(-1)};
  const torch::stable::Tensor rows = torch::stable::reshape(t, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  return torch::stable::transpose(torch::stable::transpose(rows, 2, 3), 1, 2);
}

// input [batch, in, height, width], grad_output [batch, out, rows, columns]
inline GradSqnormShape conv2d_shape(const char* op, const torch::stable::Tensor& input,
                                    const torch::stable::Tensor& grad_output, const std::vector<int64_t>& kernel,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& dilation, int64_t groups) {
  check_pair(op, input, grad_output);
  MEMLOC_CHECK(input.dim() == 4 && grad_output.dim() == 4 && input.size(0) == grad_output.size(0), op,
               ": input and grad_output must be [batch, in, height, width] and [batch, out, rows, columns], got ",
               shape_of(input), " and ", shape_of(grad_output));
  check_conv2d_numbers(op, input.size(2), input.size(3), kernel, stride, padding, dilation);
  MEMLOC_CHECK(groups >= 1 && input.size(1) % groups == 0 && grad_output.size(1) % groups == 0, op,
               ": groups must divide the ", input.size(1), " input and ", grad_output.size(1), " output channels, got ",
               groups);
  const GradSqnormShape shape{groups,
                              input.size(1) / groups,
                              grad_output.size(1) / groups,
                              {input.size(2), kernel[0], stride[0], padding[0], dilation[0]},
                              {input.size(3), kernel[1], stride[1], padding[1], dilation[1]}};
  MEMLOC_CHECK(shape.y.valid() && shape.x.valid() && grad_output.size(2) == shape.y.positions() &&
                   grad_output.size(3) == shape.x.positions(),
               op, ": grad_output must be the gradient of the convolution's output, got ", shape_of(grad_output),
               " for input ", shape_of(input), " and kernel ", kernel[0], " x ", kernel[1]);
  return shape;
}

// group_ids [batch]; that each is in [0, num_groups) is left to the kernel, which reads them.
inline void check_groups(const char* op, const torch::stable::Tensor& input, const torch::stable::Tensor& group_ids,
                         int64_t num_groups) {
  MEMLOC_CHECK(group_ids.defined(), op, ": group_ids must be a tensor, got None");
  MEMLOC_CHECK(group_ids.scalar_type() == torch::headeronly::ScalarType::Long, op,
               ": group_ids must have dtype int64, got ", torch::headeronly::toString(group_ids.scalar_type()));
  MEMLOC_CHECK(group_ids.dim() == 1 && group_ids.size(0) == input.size(0), op, ": group_ids must have shape [",
               input.size(0), "], got ", shape_of(group_ids));
  MEMLOC_CHECK(on_same_device(group_ids, input), op, ": group_ids must be on the device of input");
  MEMLOC_CHECK(num_groups >= 1, op, ": num_groups must be at least 1, got ", num_groups);
}

}  // namespace memloc
