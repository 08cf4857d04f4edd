// Per-example gradient norms on CUDA: unwraps tensors, guards the device, picks the way, launches on the current
// stream. Never waits for the device, so that it can be captured in a graph.
//
// The Gram ways multiply through aten::bmm, so in the user's float32 precision, into scratch that is used again and
// again: as many examples at a time as leave it in the second-level cache between the product and the sum over pairs,
// and of a large image only the pairs of a band of positions.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cuda/grad_sqnorm_ways.h"
#include "cuda/launch.h"
#include "grad_sqnorm_args.h"

namespace memloc {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kCopyElements = int64_t{32}
                                  << 20;  // of operands at a time, which are copied if their strides need it
constexpr int64_t kBandPositions = 256;   // enough rows for a product to run at speed
constexpr int64_t kMostProducts = 65535;  // of one bmm: what the third dimension of a grid takes

Tensor slice(const Tensor& t, int64_t dim, int64_t first, int64_t count, int64_t step) {
  if (first == 0 && count == t.size(dim) && step == 1) return t;  // calls take longer than small chunks do
  return call("aten::slice", "Tensor", t, dim, std::optional<int64_t>(first),
              std::optional<int64_t>(first + (count - 1) * step + 1), step);
}

// Some examples and groups of a layer, whose Grams are computed together.
struct Chunk {
  Range examples, groups;

  int64_t count() const { return examples.count * groups.count; }
};

// A strided part of the rows or columns of an image.
struct Steps {
  int64_t first, count, step;

  bool operator==(const Steps& other) const {
    return first == other.first && count == other.count && step == other.step;
  }
};

// [count, channels, rows * columns]: a view where the strides allow, else a copy.
Tensor part(const Tensor& t, const Chunk& chunk, int64_t channels, const Steps& y, const Steps& x) {
  Tensor images = slice(t, 0, chunk.examples.first, chunk.examples.count, 1);
  images = slice(images, 1, chunk.groups.first * channels, chunk.groups.count * channels, 1);
  images = slice(slice(images, 2, y.first, y.count, y.step), 3, x.first, x.count, x.step);
  const std::vector<int64_t> sizes{chunk.count(), channels, y.count * x.count};
  return torch::stable::reshape(images, IntHeaderOnlyArrayRef(sizes));
}

// The Gram ways for one layer.
class GramWay {
 public:
  GramWay(const Tensor& x, const Tensor& g, const GradSqnormShape& shape, cudaStream_t stream)
      : x_(x), g_(g), shape_(shape), stream_(stream), is_double_(x.scalar_type() == ScalarType::Double) {
    const Axis &row = shape.y, &column = shape.x;
    for (int64_t i = 0; i < row.residues(); ++i) rows_.emplace_back(row, i);
    for (int64_t i = 0; i < column.residues(); ++i) columns_.emplace_back(column, i);
    const int64_t positions = row.positions() * column.positions();
    const int64_t budget = scratch_bytes(x.get_device_index()) / (is_double_ ? 8 : 4);
    bands_ = {row.positions(), column.positions(), std::clamp<int64_t>(budget / (2 * positions), 1, kBandPositions)};
    for (int64_t i = 0; i < bands_.count(); ++i) measure(bands_[i]);
    const int64_t operands = shape.inputs * row.size * column.size + shape.outputs * positions;
    const int64_t copies = std::max<int64_t>(1, kCopyElements / operands);
    const int64_t products = std::clamp<int64_t>(budget / (most_positions_ + most_pixels_), 1, copies);
    groups_ = std::min({shape.groups, products, kMostProducts});
    examples_ = groups_ < shape.groups ? 1 : std::min(x.size(0), std::min(products, kMostProducts) / groups_);
    parts_ = grad_sqnorm_gram_parts(bands_, examples_ * groups_);
  }

  int64_t parts() const { return parts_; }

  // Adds to partials [batch * groups, parts].
  void run(double* partials) {
    position_gram_ = scratch(examples_ * groups_ * most_positions_);
    pixel_gram_ = scratch(examples_ * groups_ * most_pixels_);
    for (int64_t b = 0; b < x_.size(0); b += examples_) {
      for (int64_t group = 0; group < shape_.groups; group += groups_) {
        const Chunk chunk{{b, std::min(examples_, x_.size(0) - b)}, {group, std::min(groups_, shape_.groups - group)}};
        double* const own = partials + (b * shape_.groups + group) * parts_;
        for (int64_t i = 0; i < bands_.count(); ++i) add_band(chunk, bands_[i], own);
      }
    }
  }

 private:
  // How much scratch a band takes.
  void measure(const Band& band) {
    most_positions_ = std::max(most_positions_, band.left.count() * band.right.count());
    for (const Residue& y : rows_) {
      for (const Residue& x : columns_) {
        const Box left{y.met_by(band.left.y), x.met_by(band.left.x)},
            right{y.met_by(band.right.y), x.met_by(band.right.x)};
        most_pixels_ = std::max(most_pixels_, left.count() * right.count());
      }
    }
  }

  Tensor scratch(int64_t count) const {
    const std::vector<int64_t> sizes{count};
    return torch::stable::new_empty(x_, IntHeaderOnlyArrayRef(sizes),
                                    is_double_ ? ScalarType::Double : ScalarType::Float);
  }

  void add_band(const Chunk& chunk, const Band& band, double* partials) {
    const auto steps = [](const Range& r) { return Steps{r.first, r.count, 1}; };
    multiply_parts(position_gram_, g_, chunk, shape_.outputs, steps(band.left.y), steps(band.left.x),
                   steps(band.right.y), steps(band.right.x));
    for (const Residue& y : rows_) {
      for (const Residue& x : columns_) add_residue(chunk, band, y, x, partials);
    }
  }

  void add_residue(const Chunk& chunk, const Band& band, const Residue& y, const Residue& x, double* partials) {
    const auto pixels = [](const Residue& residue, const Range& positions) {
      const Range met = residue.met_by(positions);
      return Steps{residue.origin + met.first * residue.stride, met.count, residue.stride};
    };
    const Steps left_y = pixels(y, band.left.y), left_x = pixels(x, band.left.x);
    const Steps right_y = pixels(y, band.right.y), right_x = pixels(x, band.right.x);
    if (left_y.count == 0 || left_x.count == 0 || right_y.count == 0 || right_x.count == 0) return;
    multiply_parts(pixel_gram_, x_, chunk, shape_.inputs, left_y, left_x, right_y, right_x);
    const GramPairs pairs{
        position_gram_.const_data_ptr(),        pixel_gram_.const_data_ptr(),          is_double_, chunk.count(), band,
        GramAxis(y, band.left.y, band.right.y), GramAxis(x, band.left.x, band.right.x)};
    check_cuda(grad_sqnorm_gram_cuda(pairs, partials, parts_, stream_), "grad_sqnorm");
  }

  // gram = left^T right, for two parts of an image.
  void multiply_parts(Tensor& gram, const Tensor& image, const Chunk& chunk, int64_t channels, const Steps& left_y,
                      const Steps& left_x, const Steps& right_y, const Steps& right_x) const {
    const Tensor left = part(image, chunk, channels, left_y, left_x);
    const bool same = left_y == right_y && left_x == right_x;
    const Tensor right = same ? left : part(image, chunk, channels, right_y, right_x);
    const std::vector<int64_t> sizes{left.size(0), left.size(2), right.size(2)};
    const Tensor out = torch::stable::view(torch::stable::narrow(gram, 0, 0, sizes[0] * sizes[1] * sizes[2]),
                                           IntHeaderOnlyArrayRef(sizes));
    multiply(torch::stable::transpose(left, 1, 2), right, out);
  }

  Tensor x_, g_;
  GradSqnormShape shape_;
  cudaStream_t stream_;
  bool is_double_;
  std::vector<Residue> rows_, columns_;
  Bands bands_;
  int64_t most_positions_ = 0, most_pixels_ = 0;  // elements of a Gram
  int64_t examples_, groups_, parts_;             // examples and groups of a chunk
  Tensor position_gram_, pixel_gram_;
};

}  // namespace

Tensor grad_sqnorm(GradSqnormMethod method, const Tensor& x, const Tensor& g, const GradSqnormShape& s) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const std::vector<int64_t> batch{x.size(0)};
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  if (x.numel() == 0 || g.numel() == 0) return torch::stable::new_zeros(x, IntHeaderOnlyArrayRef(batch), type);
  Tensor out = torch::stable::new_empty(x, IntHeaderOnlyArrayRef(batch), type);
  const cudaStream_t stream = current_stream(x.get_device_index());
  const GradSqnormImages images{view(x), view(g), element_type(x), x.size(0), s};
  if (method == GradSqnormMethod::kOuter) {
    check_cuda(grad_sqnorm_outer_cuda(images, out.mutable_data_ptr(), stream), "grad_sqnorm");
    return out;
  }
  if (method == GradSqnormMethod::kDirect && s.tensor_is_faster() && tensor_way_applies(x, s)) {
    tensor_way(x, g, s, out, nullptr, stream);
    return out;
  }
  std::vector<int64_t> sizes{x.size(0), 0};  // of the partial sums
  const auto finish = [&](const Tensor& partials) {
    check_cuda(grad_sqnorm_finish_cuda(static_cast<const double*>(partials.const_data_ptr()), sizes[1], sizes[0],
                                       is_double, out.mutable_data_ptr(), stream),
               "grad_sqnorm");
    return out;
  };
  if (method == GradSqnormMethod::kGram) {
    GramWay gram(x, g, s, stream);
    sizes[1] = s.groups * gram.parts();
    const Tensor partials = torch::stable::new_zeros(x, IntHeaderOnlyArrayRef(sizes), ScalarType::Double);
    gram.run(static_cast<double*>(partials.mutable_data_ptr()));
    return finish(partials);
  }
  sizes[1] = grad_sqnorm_direct_parts(images);
  const Tensor partials = torch::stable::new_empty(x, IntHeaderOnlyArrayRef(sizes), ScalarType::Double);
  check_cuda(grad_sqnorm_direct_cuda(images, static_cast<double*>(partials.mutable_data_ptr()), sizes[1], stream),
             "grad_sqnorm");
  return finish(partials);
}

namespace {

Tensor linear_grad_sqnorm(const Tensor& input, const Tensor& grad_output, const std::string& method) {
  const char* const op = "linear_grad_sqnorm";
  const GradSqnormShape shape = linear_shape(op, input, grad_output);
  const GradSqnormMethod best = shape.choose_cuda(element_size(input) == 2);
  const GradSqnormMethod way = parse_method(op, method, "gram", shape, best);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  return grad_sqnorm(way, image_of(detached(input), shape), image_of(detached(grad_output), shape), shape);
}

Tensor conv2d_grad_sqnorm(const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, const std::string& method) {
  const char* const op = "conv2d_grad_sqnorm";
  const GradSqnormShape shape = conv2d_shape(op, input, grad_output, kernel_size, stride, padding, dilation, groups);
  const GradSqnormMethod best = shape.choose_cuda(element_size(input) == 2);
  const GradSqnormMethod way = parse_method(op, method, "shifted_gram", shape, best);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  return grad_sqnorm(way, detached(input), detached(grad_output), shape);
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CUDA, m) {
  m.impl("linear_grad_sqnorm", TORCH_BOX(&memloc::linear_grad_sqnorm));
  m.impl("conv2d_grad_sqnorm", TORCH_BOX(&memloc::conv2d_grad_sqnorm));
}
