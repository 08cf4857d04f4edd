// A convolution that reads some input channels of each example, and its gradients, on the CPU. The kernels are in
// kept_conv2d_kernels.inc, compiled once per instruction set (kept_conv2d_*.cpp). 16-bit values are computed in float.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/kept_conv2d_kernels.h"
#include "cpu/simd.h"
#include "kept_conv2d_dense.h"

namespace memloc {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;

template <typename E>
KeptConv2dKernels<E> kernels() {
  return for_this_machine([](auto set) { return kept_conv2d_kernels<set.value, E>(); });
}

// Whether processors multiply this 16-bit type itself, several times faster than floats.
bool native(ScalarType dtype) {
#if MEMLOC_INSTRUCTION_SETS
  if (dtype == ScalarType::BFloat16) return __builtin_cpu_supports("avx512bf16") != 0;
#endif
  return false;
}

// The library's convolution takes 1 for every multiply-add of all channels. Tiles take as much for those of kept ones,
// in whole vectors of outputs, and as measured, what 16 positions take for each example, to read the filters it keeps.
bool skipping_pays(const KeptConv2dShape& s, const Tensor& keep) {
  const bool* const kept = static_cast<const bool*>(keep.const_data_ptr());
  int64_t count = 0;
  for (int64_t b = 0; b < keep.size(0); ++b) {
    for (int64_t c = 0; c < keep.size(1); ++c) count += kept[b * keep.stride(0) + c * keep.stride(1)];
  }
  const int64_t lanes = kernels<float>().tile_columns;
  const double share = static_cast<double>(count) / std::max<int64_t>(1, keep.numel());
  const double width = static_cast<double>(divide_up(s.outputs, lanes) * lanes) / std::max<int64_t>(1, s.outputs);
  return share * width * (1 + 16.0 / s.positions()) < 0.9;
}

Tensor widened(const Tensor& t) {
  const bool half = element_size(t) == 2;
  return half ? torch::stable::to(t, ScalarType::Float) : t;
}

Tensor narrowed(const Tensor& result, const Tensor& like) {
  return element_size(like) == 2 ? torch::stable::to(result, like.scalar_type()) : result;
}

// Runs work, a template on the element, for the type that is computed in.
template <typename Run>
void with_computed(const Tensor& t, const Run& run) {
  t.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Tensor large(const Tensor& like, const Numbers& sizes) {
  const Tensor result = torch::stable::new_empty(like, IntHeaderOnlyArrayRef(sizes));
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * element_size(result));
  return result;
}

// The kept channels of each example in one group.
struct KeptLists {
  Numbers channels, first{0};

  KeptLists(const Tensor& keep, const KeptConv2dShape& s, int64_t group) {
    const bool* const kept = static_cast<const bool*>(keep.const_data_ptr());
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t c = 0; c < s.inputs; ++c) {
        if (kept[b * keep.stride(0) + (group * s.inputs + c) * keep.stride(1)]) channels.push_back(c);
      }
      first.push_back(static_cast<int64_t>(channels.size()));
    }
  }
};

template <typename E>
E* data_of(const Tensor& t) {
  return static_cast<E*>(const_cast<void*>(t.const_data_ptr()));
}

// Filters as KeptConv2dProblem has them, one group's.
template <typename E>
Tensor rows_of(const KeptConv2dKernels<E>& kernel, const Tensor& weight, const KeptConv2dShape& s, int64_t group) {
  const int64_t width = kernel.tile_columns, rows = s.inputs * s.offsets(), panels = divide_up(s.outputs, width);
  const Tensor result = torch::stable::new_zeros(weight, IntHeaderOnlyArrayRef(Numbers{panels, rows, width}));
  torch::stable::parallel_for(0, panels, 1 + 65536 / (rows * width), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * width; o < std::min(s.outputs, end * width); o += width) {
      const E* const from = data_of<E>(weight) + (group * s.outputs + o) * rows;
      kernel.transpose(data_of<E>(result) + o * rows, width, from, rows, std::min(width, s.outputs - o), rows);
    }
  });
  return result;
}

int64_t parts_of(int64_t tasks) {
  return std::max<int64_t>(1, divide_up(torch::stable::get_num_threads(), std::max<int64_t>(1, tasks)));
}

template <typename E>
KeptConv2dProblem<E> problem_of(const KeptConv2dShape& s, const KeptLists& lists, int64_t panels) {
  KeptConv2dProblem<E> p{};
  p.kept = lists.channels.data(), p.first = lists.first.data();
  p.batch = s.batch, p.inputs = s.inputs, p.outputs = s.outputs, p.panels = panels;
  p.y = s.y, p.x_axis = s.x;
  return p;
}

template <typename E>
void read_image(KeptConv2dProblem<E>& p, const Tensor& x, int64_t group) {
  p.x = data_of<E>(x) + group * p.inputs * x.stride(1);
  p.x_batch = x.stride(0), p.x_channel = x.stride(1), p.x_row = x.stride(2), p.x_column = x.stride(3);
}

template <typename E>
void share(KeptConv2dKernel<E> work, const KeptConv2dProblem<E>& p, int64_t tasks) {
  const int64_t parts = parts_of(tasks);
  torch::stable::parallel_for(0, tasks * parts, 1, [&](int64_t begin, int64_t end) { work(p, parts, begin, end); });
}

Tensor kept_conv2d(const Tensor& x, const Tensor& keep, const Tensor& weight, std::optional<Tensor> bias,
                   Numbers stride, Numbers padding, Numbers dilation, int64_t groups) {
  const KeptConv2dGeometry geometry{stride, padding, dilation, groups};
  const KeptConv2dShape s = check_kept_conv2d(x, keep, weight, bias, geometry);
  if (native(x.scalar_type())) return dense_conv2d(x, keep, weight, bias, geometry);
  const Tensor image = widened(x), filters = torch::stable::contiguous(widened(weight));
  const std::optional<Tensor> shift = bias ? std::optional(torch::stable::contiguous(widened(*bias))) : std::nullopt;
  if (!skipping_pays(s, keep)) return narrowed(dense_conv2d(image, keep, filters, shift, geometry), x);
  const Tensor y = large(image, {s.batch, s.groups * s.outputs, s.y.positions(), s.x.positions()});
  if (y.numel() == 0) return narrowed(y, x);
  with_computed(x, [&](auto element) {
    using E = decltype(element);
    const KeptConv2dKernels<E> kernel = kernels<E>();
    const int64_t panels = divide_up(s.outputs, kernel.tile_columns);
    for (int64_t group = 0; group < s.groups; ++group) {
      const KeptLists lists(keep, s, group);
      const Tensor rows = rows_of(kernel, filters, s, group);
      KeptConv2dProblem<E> p = problem_of<E>(s, lists, panels);
      read_image(p, image, group);
      p.rows = data_of<E>(rows);
      p.bias = bias ? data_of<E>(*shift) + group * s.outputs : nullptr;
      p.result = data_of<E>(y) + group * s.outputs * s.positions(), p.result_batch = y.stride(0);
      share(kernel.forward, p, s.batch);
    }
  });
  return narrowed(y, x);
}

Tensor kept_conv2d_input_grad(const Tensor& grad, const Tensor& keep, const Tensor& weight, Numbers input_size,
                              Numbers stride, Numbers padding, Numbers dilation, int64_t groups) {
  const KeptConv2dGeometry geometry{stride, padding, dilation, groups};
  const KeptConv2dShape s = check_kept_input_grad(grad, keep, weight, input_size, geometry);
  if (native(grad.scalar_type())) return dense_conv2d_input_grad(grad, keep, weight, input_size, geometry);
  const Numbers sizes{s.batch, s.groups * s.inputs, s.y.size, s.x.size};
  const Tensor g = torch::stable::contiguous(widened(grad)), filters = torch::stable::contiguous(widened(weight));
  if (!skipping_pays(s, keep)) return narrowed(dense_conv2d_input_grad(g, keep, filters, input_size, geometry), grad);
  const Tensor result = large(g, sizes);
  if (result.numel() == 0) return narrowed(result, grad);
  with_computed(grad, [&](auto element) {
    using E = decltype(element);
    const KeptConv2dKernels<E> kernel = kernels<E>();
    const int64_t panels = divide_up(s.outputs, kernel.tile_columns);
    for (int64_t group = 0; group < s.groups; ++group) {
      const KeptLists lists(keep, s, group);
      const Tensor rows = rows_of(kernel, filters, s, group);
      KeptConv2dProblem<E> p = problem_of<E>(s, lists, panels);
      p.rows = data_of<E>(rows);
      p.grad = data_of<E>(g) + group * s.outputs * s.positions(), p.grad_batch = g.stride(0);
      p.result = data_of<E>(result) + group * s.inputs * s.y.size * s.x.size, p.result_batch = result.stride(0);
      share(kernel.input_grad, p, s.batch);
    }
  });
  return narrowed(result, grad);
}

Tensor kept_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& keep, Numbers kernel_size,
                               Numbers stride, Numbers padding, Numbers dilation, int64_t groups) {
  const KeptConv2dGeometry geometry{stride, padding, dilation, groups};
  const KeptConv2dShape s = check_kept_weight_grad(grad, x, keep, kernel_size, geometry);
  if (native(x.scalar_type())) return dense_conv2d_weight_grad(grad, x, keep, kernel_size, geometry);
  const Numbers sizes{s.groups * s.outputs, s.inputs, s.y.kernel, s.x.kernel};
  const Tensor image = widened(x), g = torch::stable::contiguous(widened(grad));
  if (!skipping_pays(s, keep)) return narrowed(dense_conv2d_weight_grad(g, image, keep, kernel_size, geometry), x);
  const Tensor result = torch::stable::new_zeros(g, IntHeaderOnlyArrayRef(sizes));
  if (g.numel() == 0) return narrowed(result, x);
  with_computed(x, [&](auto element) {
    using E = decltype(element);
    const KeptConv2dKernels<E> kernel = kernels<E>();
    const int64_t panels = divide_up(s.outputs, kernel.tile_columns);
    const int64_t rows = s.inputs * s.offsets();
    for (int64_t group = 0; group < s.groups; ++group) {
      const KeptLists lists(keep, s, group);
      const Tensor sums =
          torch::stable::new_zeros(g, IntHeaderOnlyArrayRef(Numbers{panels, rows, kernel.tile_columns}));
      KeptConv2dProblem<E> p = problem_of<E>(s, lists, panels);
      read_image(p, image, group);
      p.row_sums = data_of<E>(sums);
      p.grad = data_of<E>(g) + group * s.outputs * s.positions(), p.grad_batch = g.stride(0);
      share(kernel.weight_grad, p, panels);
      E* const to = data_of<E>(result) + group * s.outputs * rows;
      const int64_t columns = kernel.tile_columns;
      torch::stable::parallel_for(0, panels, 1 + 65536 / (rows * columns), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin * columns; o < std::min(s.outputs, end * columns); o += columns) {
          kernel.transpose(to + o * rows, rows, p.row_sums + o * rows, columns, rows, std::min(columns, s.outputs - o));
        }
      });
    }
  });
  return narrowed(result, x);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("kept_conv2d", TORCH_BOX(&memloc::kept_conv2d));
  m.impl("kept_conv2d_input_grad", TORCH_BOX(&memloc::kept_conv2d_input_grad));
  m.impl("kept_conv2d_weight_grad", TORCH_BOX(&memloc::kept_conv2d_weight_grad));
}
