// Per-example gradient norms on the CPU: picks the way; threads share the examples. Sums of tiles are added up in
// double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/element_types.h"
#include "cpu/grad_sqnorm_tensors.h"
#include "cpu/squares.h"
#include "grad_sqnorm_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Source>
void outer(const GradSqnormProblem<Source>& p, const GradSqnormShape& s, int64_t batch, double* out) {
  const Operand<Source>&xs = p.x, &gs = p.g;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, s.inputs + s.outputs));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      out[b] =
          square(xs.data + b * xs.batch, s.inputs, xs.channel) * square(gs.data + b * gs.batch, s.outputs, gs.channel);
    }
  });
}

}  // namespace

template <typename Source>
void add_sqnorms(GradSqnormMethod method, const GradSqnormProblem<Source>& problem, const GradSqnormShape& s,
                 int64_t batch, double* out) {
  if (method == GradSqnormMethod::kOuter) return outer(problem, s, batch, out);
  const GradSqnormKernels<Source> way = kernels<Source>();
  const GradSqnormKernel<Source> kernel = method == GradSqnormMethod::kGram ? way.gram : way.direct;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) { kernel(problem, out, begin, end); });
}

template void add_sqnorms(GradSqnormMethod, const GradSqnormProblem<c10::Half>&, const GradSqnormShape&, int64_t,
                          double*);
template void add_sqnorms(GradSqnormMethod, const GradSqnormProblem<c10::BFloat16>&, const GradSqnormShape&, int64_t,
                          double*);
template void add_sqnorms(GradSqnormMethod, const GradSqnormProblem<float>&, const GradSqnormShape&, int64_t, double*);
template void add_sqnorms(GradSqnormMethod, const GradSqnormProblem<double>&, const GradSqnormShape&, int64_t, double*);

namespace {

// x [batch, groups * inputs, height, width], g [batch, groups * outputs, rows, columns]
Tensor sqnorm(GradSqnormMethod method, const Tensor& x, const Tensor& g, const GradSqnormShape& s) {
  const std::vector<int64_t> batch{x.size(0)};
  const Tensor out = torch::stable::new_zeros(x, torch::headeronly::IntHeaderOnlyArrayRef(batch), ScalarType::Double);
  double* const data = static_cast<double*>(out.mutable_data_ptr());
  if (x.numel() != 0 && g.numel() != 0 && s.positions() > 0) {
    with_element(
        x, [&](auto element) { add_sqnorms(method, problem_of<decltype(element)>(x, g, s), s, x.size(0), data); });
  }
  return x.scalar_type() == ScalarType::Double ? out : torch::stable::to(out, ScalarType::Float);
}

Tensor linear_grad_sqnorm(const Tensor& input, const Tensor& grad_output, const std::string& method) {
  const char* const op = "linear_grad_sqnorm";
  const GradSqnormShape shape = linear_shape(op, input, grad_output);
  const GradSqnormMethod way = parse_method(op, method, "gram", shape, shape.choose(), shape.gram_fits());
  return sqnorm(way, image_of(input, shape), image_of(grad_output, shape), shape);
}

Tensor conv2d_grad_sqnorm(const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, const std::string& method) {
  const char* const op = "conv2d_grad_sqnorm";
  const GradSqnormShape shape = conv2d_shape(op, input, grad_output, kernel_size, stride, padding, dilation, groups);
  return sqnorm(parse_method(op, method, "shifted_gram", shape, shape.choose(), shape.gram_fits()), input, grad_output,
                shape);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("linear_grad_sqnorm", TORCH_BOX(&memloc::linear_grad_sqnorm));
  m.impl("conv2d_grad_sqnorm", TORCH_BOX(&memloc::conv2d_grad_sqnorm));
}
