// The direct way on tensor cores: brings operands into the order that its kernel reads, some examples at a time, so
// that scratch is bounded.
#include <algorithm>
#include <limits>

#include "cuda/grad_sqnorm_tensor.h"
#include "cuda/grad_sqnorm_ways.h"
#include "cuda/launch.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPartialBytes = int64_t{32} << 20;  // parts of norms at a time
constexpr double kMostOffset = std::numeric_limits<int32_t>::max();

Tensor scratch(const Tensor& like, int64_t count, ScalarType type) {
  const std::vector<int64_t> sizes{std::max<int64_t>(1, count)};
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

// One operand: read where it lies if the kernel can, else packed.
class Operand {
 public:
  Operand(const Tensor& t, int64_t groups, bool row_by_row)
      : view_(view(t)), rows_(t.size(2)), columns_(t.size(3)), groups_(groups), channels_(t.size(1) / groups) {
    const auto whole = [](int64_t size, int64_t stride) { return size == 1 || stride % 8 == 0; };
    packed_ = !(view_.channel == 1 && channels_ % 8 == 0 && whole(t.size(0), view_.batch) && whole(rows_, view_.row) &&
                whole(columns_, view_.column) && (row_by_row || rows_ == 1 || follow()) &&
                reinterpret_cast<uintptr_t>(view_.data) % 16 == 0 && reach() <= kMostOffset);
  }

  int64_t packed_bytes() const { return packed_ ? 2 * packed_elements() : 0; }

  // Examples [first, first + count), which are packed into `to`.
  ChannelsLast examples(int64_t first, int64_t count, void* to, cudaStream_t stream) const {
    const auto small = [](int64_t n) { return static_cast<int32_t>(n); };
    ImageView part = view_;
    part.data = static_cast<const uint16_t*>(view_.data) + first * view_.batch;
    const int64_t channels = padded(channels_);
    if (!packed_) {
      const bool one_column = columns_ == 1;  // then the stride between columns says nothing
      return {
          part.data,       part.batch,     small(rows_ == 1 ? 0 : part.row), small(one_column ? part.row : part.column),
          small(channels), small(channels)};
    }
    check_cuda(grad_sqnorm_pack_cuda(part, count, rows_, columns_, groups_, channels_, to, stream), "grad_sqnorm");
    const int64_t column = groups_ * channels;
    return {to, packed_elements(), small(columns_ * column), small(column), small(channels), small(channels)};
  }

  int64_t packed_elements() const { return rows_ * columns_ * groups_ * padded(channels_); }

 private:
  // Whether rows follow each other like the positions in one.
  bool follow() const { return columns_ == 1 || view_.row == columns_ * view_.column; }
  // The furthest element of an example.
  double reach() const {
    return 1.0 * (rows_ - 1) * view_.row + 1.0 * (columns_ - 1) * view_.column + 1.0 * groups_ * channels_;
  }

  ImageView view_;
  int64_t rows_, columns_, groups_, channels_;
  bool packed_;
};

}  // namespace

bool tensor_way_applies(const Tensor& x, const GradSqnormShape& s) {
  if (element_size(x) != 2) return false;
  const double pixels = 1.0 * s.y.size * s.x.size, patches = 1.0 * s.y.kernel * s.x.kernel * padded(s.inputs);
  return pixels * s.groups * padded(s.inputs) < kMostOffset &&
         s.positions() * s.groups * padded(s.outputs) < kMostOffset && patches < kMostOffset &&
         s.positions() * x.size(0) < kMostOffset && s.y.padding + s.y.size < kMostOffset / 2 &&
         s.x.padding + s.x.size < kMostOffset / 2;
}

void tensor_way(const Tensor& x, const Tensor& g, const GradSqnormShape& shape, Tensor& norms, Tensor* sums,
                cudaStream_t stream) {
  const Operand inputs(x, shape.groups, true), outputs(g, shape.groups, false);
  const int64_t batch = x.size(0), packed = inputs.packed_bytes() + outputs.packed_bytes();
  GradSqnormTensor problem{{}, {}, x.scalar_type() == ScalarType::Half, batch, 1, shape};
  problem.x.channels = static_cast<int32_t>(padded(shape.inputs));
  problem.g.channels = static_cast<int32_t>(padded(shape.outputs));
  const int64_t parts = problem.parts(), each = std::max<int64_t>(packed, 1);
  const int64_t most = std::min(scratch_bytes(x.get_device_index()) / each, kPartialBytes / (8 * parts));
  const int64_t step = std::clamp<int64_t>(most, 1, batch);
  problem.batch = step;
  problem.splits = problem.best_splits(sums != nullptr);
  const Tensor x_packed = scratch(x, step * inputs.packed_bytes() / 2, x.scalar_type());
  const Tensor g_packed = scratch(x, step * outputs.packed_bytes() / 2, x.scalar_type());
  const Tensor partials = scratch(x, step * parts, ScalarType::Double);
  const Tensor split_sums = scratch(x, sums != nullptr ? problem.splits * problem.sum_size() : 0, ScalarType::Float);
  double* const to = static_cast<double*>(partials.mutable_data_ptr());
  float* const add = sums != nullptr ? static_cast<float*>(split_sums.mutable_data_ptr()) : nullptr;
  for (int64_t first = 0; first < batch; first += step) {
    problem.batch = std::min(step, batch - first);
    problem.x = inputs.examples(first, problem.batch, x_packed.mutable_data_ptr(), stream);
    problem.g = outputs.examples(first, problem.batch, g_packed.mutable_data_ptr(), stream);
    check_cuda(grad_sqnorm_tensor_cuda(problem, to, add, first > 0, stream), "grad_sqnorm");
    float* const out = static_cast<float*>(norms.mutable_data_ptr()) + first;
    check_cuda(grad_sqnorm_finish_cuda(to, parts, problem.batch, false, out, stream), "grad_sqnorm");
  }
  if (sums == nullptr) return;
  check_cuda(
      grad_sqnorm_add_splits_cuda(add, problem.splits, shape, static_cast<float*>(sums->mutable_data_ptr()), stream),
      "grad_sqnorm");
}

}  // namespace memloc
