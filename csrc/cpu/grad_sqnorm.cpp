// Per-example gradient norms on the CPU: picks the way; threads share the examples. Sums of tiles are added up in
// double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/element_types.h"
#include "cpu/grad_sqnorm_tensors.h"
#include "cpu/simd.h"
#include "grad_sqnorm_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sum of squares: in float over blocks too short to lose digits, these in double.
MEMLOC_CLONES double square(const float* p, int64_t n) {
  constexpr int64_t kBlock = 256, kLanes = 16;
  double sum = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    float lanes[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += p[i + k] * p[i + k];
    }
    for (; i < end; ++i) lanes[0] += p[i] * p[i];
    for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
  }
  return sum;
}

template <typename Source>
double square(const Source* p, int64_t n, int64_t step) {
  if constexpr (std::is_same_v<Source, float>) {
    if (step == 1) return square(p, n);
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(p[i * step]);
    sum += value * value;
  }
  return sum;
}

template <typename Source>
void outer(const Tensor& x, const Tensor& g, const GradSqnormShape& s, double* out) {
  const Operand<Source> xs = operand<Source>(x), gs = operand<Source>(g);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, s.inputs + s.outputs));
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      out[b] =
          square(xs.data + b * xs.batch, s.inputs, xs.channel) * square(gs.data + b * gs.batch, s.outputs, gs.channel);
    }
  });
}

template <typename Source>
void run(GradSqnormMethod method, const Tensor& x, const Tensor& g, const GradSqnormShape& s, double* out) {
  if (method == GradSqnormMethod::kOuter) return outer<Source>(x, g, s, out);
  const GradSqnormProblem<Source> problem = problem_of<Source>(x, g, s);
  const GradSqnormKernels<Source> way = kernels<Source>();
  const GradSqnormKernel<Source> kernel = method == GradSqnormMethod::kGram ? way.gram : way.direct;
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) { kernel(problem, out, begin, end); });
}

// x [batch, groups * inputs, height, width], g [batch, groups * outputs, rows, columns]
Tensor sqnorm(GradSqnormMethod method, const Tensor& x, const Tensor& g, const GradSqnormShape& s) {
  const std::vector<int64_t> batch{x.size(0)};
  const Tensor out = torch::stable::new_zeros(x, torch::headeronly::IntHeaderOnlyArrayRef(batch), ScalarType::Double);
  double* const data = static_cast<double*>(out.mutable_data_ptr());
  if (x.numel() != 0 && g.numel() != 0 && s.positions() > 0) {
    with_element(x, [&](auto element) { run<decltype(element)>(method, x, g, s, data); });
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
