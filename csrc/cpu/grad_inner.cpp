// Inner products of all pairs of the examples' own weight gradients, on the CPU. Some tiles of the gradients at a time,
// of all examples, go to scratch that stays in the cache, and are multiplied with each other there.
//
// Memory: the result, in double too, kPackedBytes of packed operands (a panel of either for all examples, if that is
// more) and kRowBytes of tiles (kFewestTiles of each example, if that is more). Threads share the tiles, then the pairs
// of blocks of examples, whose sums are added up in the order of the tiles: the result does not depend on their number.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/element_types.h"
#include "cpu/grad_sqnorm_tensors.h"
#include "grad_sqnorm_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPackedBytes = int64_t{16} << 20;
constexpr int64_t kRowBytes = int64_t{2} << 20;
constexpr int64_t kFewestTiles = 16;

template <typename E>
Tensor scratch(const Tensor& like, int64_t count) {
  const std::vector<int64_t> sizes{count};
  const ScalarType dtype = sizeof(E) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// inner [batch, batch] is zero; its upper triangle is added to.
template <typename Source>
void run(const Tensor& x, const Tensor& g, const GradSqnormShape& s, double* inner) {
  using E = typename GradInnerChunk<Source>::E;
  const GradSqnormKernels<Source> kernel = kernels<Source>();
  const GradSqnormLayout l(s.inputs, s.outputs, s.y, s.x, kernel.tile_rows, kernel.tile_columns);
  GradInnerChunk<Source> c{problem_of<Source>(x, g, s), l};
  c.batch = x.size(0), c.inner = inner;
  const int64_t example = c.batch * static_cast<int64_t>(sizeof(E)), tile = l.tile_rows * l.tile_columns;
  int64_t ns = l.x_panels, ms = l.g_panels;
  while (example * (ns * l.x_panel() + ms * l.g_panel()) > kPackedBytes && ns * ms > 1) {
    int64_t& larger = ms == 1 || (ns > 1 && ns * l.x_panel() > ms * l.g_panel()) ? ns : ms;
    larger = divide_up(larger, 2);
  }
  // an odd number of tiles, or the examples' rows meet in the same places of a cache
  const int64_t most = std::max(kFewestTiles, kRowBytes / (example * tile)) | 1;
  c.row_size = most * tile;
  Tensor xs = scratch<E>(x, c.batch * ns * l.x_panel()), gs = scratch<E>(x, c.batch * ms * l.g_panel());
  Tensor rows = scratch<E>(x, c.batch * c.row_size);
  c.xs = static_cast<E*>(xs.mutable_data_ptr()), c.gs = static_cast<E*>(gs.mutable_data_ptr());
  c.rows = static_cast<E*>(rows.mutable_data_ptr());
  const auto share = [&](GradInnerChunkKernel<Source> work, int64_t begin, int64_t end) {
    torch::stable::parallel_for(begin, end, 1, [&](int64_t a, int64_t b) { work(c, a, b); });
  };
  for (c.group = 0; c.group < s.groups; ++c.group) {
    for (c.first_n = 0; c.first_n < l.x_panels; c.first_n += ns) {
      c.n_panels = std::min(ns, l.x_panels - c.first_n);
      for (c.first_m = 0; c.first_m < l.g_panels; c.first_m += ms) {
        c.m_panels = std::min(ms, l.g_panels - c.first_m);
        const int64_t of_x = c.batch * c.n_panels, tiles = c.n_panels * l.offsets * c.m_panels;
        share(kernel.pack_pairs, c.first_m == 0 ? 0 : of_x, of_x + c.batch * c.m_panels);
        for (c.first_tile = 0; c.first_tile < tiles; c.first_tile += most) {
          c.tiles = std::min(most, tiles - c.first_tile);
          share(kernel.tiles_of_pairs, 0, c.batch * c.tiles);
          share(kernel.products_of_pairs, 0, c.blocks() * c.blocks());
        }
      }
    }
  }
  for (int64_t i = 0; i < c.batch; ++i) {
    for (int64_t j = 0; j < i; ++j) inner[i * c.batch + j] = inner[j * c.batch + i];
  }
}

// x [batch, groups * inputs, height, width], g [batch, groups * outputs, rows, columns]
Tensor grad_inner(const char* op, const Tensor& x, const Tensor& g, const GradSqnormShape& s) {
  check_scratch(op, GradSqnormMethod::kDirect, s);
  const std::vector<int64_t> sizes{x.size(0), x.size(0)};
  const Tensor out = torch::stable::new_zeros(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes), ScalarType::Double);
  double* const data = static_cast<double*>(out.mutable_data_ptr());
  if (x.numel() != 0 && g.numel() != 0 && s.positions() > 0) {
    with_element(x, [&](auto element) { run<decltype(element)>(x, g, s, data); });
  }
  return x.scalar_type() == ScalarType::Double ? out : torch::stable::to(out, ScalarType::Float);
}

Tensor linear_grad_inner(const Tensor& input, const Tensor& grad_output) {
  const char* const op = "linear_grad_inner";
  const GradSqnormShape s = linear_shape(op, input, grad_output);
  return grad_inner(op, image_of(input, s), image_of(grad_output, s), s);
}

Tensor conv2d_grad_inner(const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups) {
  const char* const op = "conv2d_grad_inner";
  return grad_inner(op, input, grad_output,
                    conv2d_shape(op, input, grad_output, kernel_size, stride, padding, dilation, groups));
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("linear_grad_inner", TORCH_BOX(&memloc::linear_grad_inner));
  m.impl("conv2d_grad_inner", TORCH_BOX(&memloc::conv2d_grad_inner));
}
