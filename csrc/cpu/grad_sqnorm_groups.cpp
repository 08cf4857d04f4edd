// Per-example gradient norms, the sums of the gradients over groups of examples and their inner products with
// directions, in one direct pass on the CPU.
//
// Threads share tiles of the gradient, not examples, so that a sum is kept once: memory is the result and kPackedBytes
// of packed operands (one example, if that is more). Examples go in the order of their group, some at a time: packed by
// all threads, then every task adds up its block of tiles over them. Partitions depend on sizes only, and parts are
// added in a fixed order, so the result does not depend on the number of threads. Layers with too few blocks for many
// threads split the examples too, into slices with their own sums, of at most kSliceElements.
#include "cpu/grad_sqnorm_groups.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/element_types.h"
#include "cpu/grad_sqnorm_tensors.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPackedBytes = int64_t{8} << 20;  // shared by the threads; it stays in the third-level cache
constexpr int64_t kBlockBytes = 192 << 10;          // of a task's sums and directions, in the second-level cache
constexpr int64_t kTasks = 16;                      // wanted at a time
constexpr int64_t kSliceElements = int64_t{1} << 20;

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// Scratch of the calling thread. Up to kPackedBytes are kept for its next call: layers follow each other, and fresh
// memory costs more than filling it.
class Packed {
 public:
  explicit Packed(int64_t bytes) {
    if (bytes > kPackedBytes) {
      own_.reset(new char[bytes]);
    } else if (kept_ == nullptr) {
      kept_.reset(new char[kPackedBytes]);
    }
  }
  void* get() const { return own_ != nullptr ? own_.get() : kept_.get(); }

 private:
  static thread_local std::unique_ptr<char[]> kept_;
  std::unique_ptr<char[]> own_;
};
thread_local std::unique_ptr<char[]> Packed::kept_;

// Blocks of tiles and slices for a chunk of the given size.
template <typename Source>
void share(GradSqnormChunk<Source>& c, int64_t num_groups) {
  using E = typename GradSqnormChunk<Source>::E;
  const GradSqnormLayout& l = c.layout;
  const int64_t tile =
      l.tile_rows * l.tile_columns * l.offsets * (1 + c.num_directions) * static_cast<int64_t>(sizeof(E));
  const auto tasks = [&] { return c.groups * divide_up(l.x_panels, c.n_block) * divide_up(l.g_panels, c.m_block); };
  c.n_block = 1;
  c.m_block = std::clamp<int64_t>(kBlockBytes / tile, 1, l.g_panels);
  while (tasks() < kTasks && c.m_block > 2) c.m_block = divide_up(c.m_block, 2);
  while (tasks() > 2 * kTasks && 2 * c.n_block * c.m_block * tile <= kBlockBytes) c.n_block *= 2;
  c.m_block = divide_up(l.g_panels, divide_up(l.g_panels, c.m_block));  // of nearly the same size
  c.n_block = divide_up(l.x_panels, divide_up(l.x_panels, c.n_block));
  c.n_blocks = divide_up(l.x_panels, c.n_block), c.m_blocks = divide_up(l.g_panels, c.m_block);
  const int64_t most = kSliceElements / std::max<int64_t>(1, num_groups * c.sum_size);
  c.slices = std::clamp<int64_t>(std::min(kTasks / tasks(), most), 1, c.count);
}

}  // namespace

template <typename Source, typename E>
void add_grads(const GradSqnormProblem<Source>& problem, const GradSqnormShape& s, const ExampleOrder& order,
               const E* directions, int64_t num_directions, double* sqnorm, double* dots, E* sums, int64_t num_groups) {
  const GradSqnormKernels<Source> kernel = kernels<Source>();
  const GradSqnormLayout layout(s.inputs, s.outputs, s.y, s.x, kernel.tile_rows, kernel.tile_columns);
  const int64_t batch = static_cast<int64_t>(order.examples.size());
  const int64_t bytes = (layout.x_size() + layout.g_size()) * static_cast<int64_t>(sizeof(E));
  const int64_t groups = std::clamp<int64_t>(kPackedBytes / bytes, 1, s.groups);
  const int64_t most = std::clamp<int64_t>(kPackedBytes / (bytes * groups), 1, batch);
  const int64_t step = divide_up(batch, divide_up(batch, most));

  GradSqnormChunk<Source> c{problem, layout};
  c.sum_size = s.groups * s.outputs * layout.width * layout.offsets, c.slice_size = num_groups * c.sum_size;
  c.count = step, c.groups = groups;
  c.directions = directions, c.num_directions = num_directions;
  share(c, num_groups);
  const int64_t slices = c.slices;
  std::vector<E> parts(slices > 1 ? slices * c.slice_size : 0);
  c.sums = num_groups == 0 ? nullptr : slices > 1 ? parts.data() : sums;
  const Packed packed(sizeof(E) * step * groups * (layout.x_size() + layout.g_size()));
  c.xs = static_cast<E*>(packed.get()), c.gs = c.xs + step * groups * layout.x_size();
  std::vector<double> partial((1 + c.num_directions) * c.blocks() * step);
  c.partial = partial.data();
  for (c.first_group = 0; c.first_group < s.groups; c.first_group += groups) {
    c.groups = std::min(groups, s.groups - c.first_group);
    for (int64_t first = 0; first < batch; first += step) {
      c.count = std::min(step, batch - first);
      c.examples = order.examples.data() + first, c.ids = order.ids.data() + first;
      c.slices = std::min(slices, c.count);
      torch::stable::parallel_for(0, c.pack_tasks(), 1, [&](int64_t a, int64_t b) { kernel.pack(c, a, b); });
      torch::stable::parallel_for(0, c.slices * c.blocks(), 1, [&](int64_t a, int64_t b) { kernel.add(c, a, b); });
      for (int64_t i = 0; i < (1 + c.num_directions) * c.blocks(); ++i) {
        double* const to = i < c.blocks() ? sqnorm : dots + (i / c.blocks() - 1) * batch;
        for (int64_t e = 0; e < c.count; ++e) to[c.examples[e]] += c.partial[i * c.count + e];
      }
    }
  }
  if (slices > 1) {
    for (int64_t i = 0; i < slices; ++i) {
      for (int64_t j = 0; j < c.slice_size; ++j) sums[j] += parts[i * c.slice_size + j];
    }
  }
}

template void add_grads(const GradSqnormProblem<c10::Half>&, const GradSqnormShape&, const ExampleOrder&, const float*,
                        int64_t, double*, double*, float*, int64_t);
template void add_grads(const GradSqnormProblem<c10::BFloat16>&, const GradSqnormShape&, const ExampleOrder&,
                        const float*, int64_t, double*, double*, float*, int64_t);
template void add_grads(const GradSqnormProblem<float>&, const GradSqnormShape&, const ExampleOrder&, const float*,
                        int64_t, double*, double*, float*, int64_t);
template void add_grads(const GradSqnormProblem<double>&, const GradSqnormShape&, const ExampleOrder&, const double*,
                        int64_t, double*, double*, double*, int64_t);

GradPass grad_pass(const char* op, const Tensor& x, const Tensor& g, const std::optional<Tensor>& directions,
                   const std::optional<Tensor>& group_ids, int64_t num_groups, const GradSqnormShape& s,
                   const std::vector<int64_t>& weight) {
  check_scratch(op, GradSqnormMethod::kDirect, s);
  const ExampleOrder order(op, x.size(0), group_ids, num_groups);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> sizes{num_groups};
  sizes.insert(sizes.end(), weight.begin(), weight.end());
  const Tensor along = directions ? torch::stable::contiguous(*directions) : zeros(x, {0}, dtype);
  const Tensor norms = zeros(x, {x.size(0)}, ScalarType::Double);
  const Tensor dots = zeros(x, {along.size(0), x.size(0)}, ScalarType::Double);
  Tensor sums = zeros(x, sizes, dtype);
  if (x.numel() != 0 && g.numel() != 0 && s.positions() > 0) {
    with_element(x, [&](auto element) {
      using Source = decltype(element);
      using E = typename ComputeIn<Source>::type;
      add_grads<Source, E>(problem_of<Source>(x, g, s), s, order, static_cast<const E*>(along.const_data_ptr()),
                           along.size(0), static_cast<double*>(norms.mutable_data_ptr()),
                           static_cast<double*>(dots.mutable_data_ptr()), static_cast<E*>(sums.mutable_data_ptr()),
                           num_groups);
    });
  }
  if (dtype == ScalarType::Double) return {dots, norms, sums};
  return {torch::stable::to(dots, dtype), torch::stable::to(norms, dtype), sums};
}

namespace {

std::tuple<Tensor, Tensor> linear_grad_sqnorm_groups(const Tensor& input, const Tensor& grad_output,
                                                     const Tensor& group_ids, int64_t num_groups) {
  const char* const op = "linear_grad_sqnorm_groups";
  const GradSqnormShape shape = linear_shape(op, input, grad_output);
  check_groups(op, input, group_ids, num_groups);
  const GradPass pass = grad_pass(op, image_of(input, shape), image_of(grad_output, shape), std::nullopt, group_ids,
                                  num_groups, shape, {shape.outputs, shape.inputs});
  return {pass.sqnorm, pass.sums};
}

std::tuple<Tensor, Tensor> conv2d_grad_sqnorm_groups(const Tensor& input, const Tensor& grad_output,
                                                     const Tensor& group_ids, int64_t num_groups,
                                                     std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                     int64_t groups) {
  const char* const op = "conv2d_grad_sqnorm_groups";
  const GradSqnormShape shape = conv2d_shape(op, input, grad_output, kernel_size, stride, padding, dilation, groups);
  check_groups(op, input, group_ids, num_groups);
  const GradPass pass = grad_pass(op, input, grad_output, std::nullopt, group_ids, num_groups, shape,
                                  {groups * shape.outputs, shape.inputs, kernel_size[0], kernel_size[1]});
  return {pass.sqnorm, pass.sums};
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("linear_grad_sqnorm_groups", TORCH_BOX(&memloc::linear_grad_sqnorm_groups));
  m.impl("conv2d_grad_sqnorm_groups", TORCH_BOX(&memloc::conv2d_grad_sqnorm_groups));
}
