// Per-example gradient norms on the CPU: picks the way and the instruction set; threads share the examples. The kernels
// are in grad_sqnorm_kernels.inc, compiled once per instruction set (grad_sqnorm_*.cpp). Sums of tiles are added up in
// double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/grad_sqnorm_kernels.h"
#include "grad_sqnorm_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The best instruction set of this machine, or a lesser one that MEMLOC_CPU_CAPABILITY names.
template <typename Source>
GradSqnormKernels<Source> kernels() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* const named = std::getenv("MEMLOC_CPU_CAPABILITY");
  const std::string wanted = named != nullptr ? named : "";
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx512 && wanted != "avx2" && wanted != "baseline") return grad_sqnorm_avx512<Source>();
  if (avx2 && wanted != "baseline") return grad_sqnorm_avx2<Source>();
#endif
  return grad_sqnorm_baseline<Source>();
}

template <typename Source>
Operand<Source> operand(const Tensor& t) {
  return {static_cast<const Source*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <typename Source>
void outer(const Tensor& x, const Tensor& g, const GradSqnormShape& s, double* out) {
  const Operand<Source> xs = operand<Source>(x), gs = operand<Source>(g);
  torch::stable::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
    const auto square = [](const Source* p, int64_t n, int64_t step) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(p[i * step]);
        sum += value * value;
      }
      return sum;
    };
    for (int64_t b = begin; b < end; ++b) {
      out[b] =
          square(xs.data + b * xs.batch, s.inputs, xs.channel) * square(gs.data + b * gs.batch, s.outputs, gs.channel);
    }
  });
}

template <typename Source>
void run(GradSqnormMethod method, const Tensor& x, const Tensor& g, const GradSqnormShape& s, double* out) {
  if (method == GradSqnormMethod::kOuter) return outer<Source>(x, g, s, out);
  const GradSqnormProblem<Source> problem{
      operand<Source>(x), operand<Source>(g), s.groups, s.inputs, s.outputs, s.y, s.x};
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
    switch (x.scalar_type()) {
      case ScalarType::Half:
        run<c10::Half>(method, x, g, s, data);
        break;
      case ScalarType::BFloat16:
        run<c10::BFloat16>(method, x, g, s, data);
        break;
      case ScalarType::Float:
        run<float>(method, x, g, s, data);
        break;
      default:
        run<double>(method, x, g, s, data);
    }
  }
  return x.scalar_type() == ScalarType::Double ? out : torch::stable::to(out, ScalarType::Float);
}

Tensor linear_grad_sqnorm(const Tensor& input, const Tensor& grad_output, const std::string& method) {
  const GradSqnormShape shape = linear_shape(input, grad_output);
  const GradSqnormMethod way = parse_method("linear_grad_sqnorm", method, "gram", shape);
  const auto image = [&](const Tensor& t) {  // [batch, features, 1, positions]
    const std::vector<int64_t> sizes{t.size(0), 1, shape.x.size, t.size(-1)};
    const Tensor rows = torch::stable::reshape(t, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
    return torch::stable::transpose(torch::stable::transpose(rows, 2, 3), 1, 2);
  };
  return sqnorm(way, image(input), image(grad_output), shape);
}

Tensor conv2d_grad_sqnorm(const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, const std::string& method) {
  const GradSqnormShape shape = conv2d_shape(input, grad_output, kernel_size, stride, padding, dilation, groups);
  return sqnorm(parse_method("conv2d_grad_sqnorm", method, "shifted_gram", shape), input, grad_output, shape);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("linear_grad_sqnorm", TORCH_BOX(&memloc::linear_grad_sqnorm));
  m.impl("conv2d_grad_sqnorm", TORCH_BOX(&memloc::conv2d_grad_sqnorm));
}
