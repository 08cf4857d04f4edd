// Many layers accounted in one call on the CPU: one after the other, with the kernels of the operators for one layer
// and their workspace. A layer's weight takes the pass of grad_sqnorm_groups.cpp if sums are wanted, else the way to
// norms that is the cheapest. What has a row for each example (scales, shifts, what is added) is squared and added up
// here.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "account_args.h"
#include "cpu/element_types.h"
#include "cpu/grad_sqnorm_groups.h"
#include "cpu/grad_sqnorm_tensors.h"
#include "cpu/new_tensor.h"
#include "cpu/squares.h"
#include "normalization_grads_args.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kGrain = 32768;  // least elements worth a thread

template <typename E>
Tensor zeros(const Sizes& sizes) {
  const int32_t dtype = std::is_same_v<E, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  double elements = 1;
  for (const int64_t size : sizes) elements *= static_cast<double>(std::max<int64_t>(1, size));
  MEMLOC_CHECK(elements < 1e15, "account: a result must have less than 10^15 elements, got ", elements);
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  const Tensor t = new_strided("account", sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * sizeof(E));
  return t;
}

// Nested loops, outer first, as one of even steps, if they are one.
struct Line {
  int64_t size = 1, step = 0;
  bool even = true;

  void inside(int64_t n, int64_t stride) {
    even = even && (n == 1 || size == 1 || step == n * stride);
    if (n != 1) step = stride;
    size *= n;
  }
};

// A tensor as [batch, channels, rows, columns].
struct Planes {
  Tensor tensor;
  Line batch, channel, row, column;

  bool dense(const Line& l) const { return l.size == 1 || l.step == 1; }

  template <typename Source>
  Operand<Source> operand() const {
    return {static_cast<const Source*>(tensor.const_data_ptr()), batch.step, channel.step, row.step, column.step};
  }
  NormalizationStrides strides() const {
    const auto step = [](const Line& l) { return l.size == 1 ? 0 : l.step; };
    return {step(batch), step(channel), step(column)};
  }
};

Planes planes_of(const Tensor& t, const AccountLayer& l, bool copied = false) {
  Planes p{t, {}, {}, {}, {}};
  const int64_t dims = t.dim();
  if (!l.tokens()) {
    p.batch.inside(t.size(0), t.stride(0)), p.channel.inside(t.size(1), t.stride(1));
    for (int64_t d = 2; d < dims; ++d) p.column.inside(t.size(d), t.stride(d));
  } else {
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t n = t.size(d), step = t.stride(d);
      if (d == l.dim) {
        const int64_t batch = n / l.before / l.after;
        p.row.inside(l.before, batch * l.after * step);
        p.batch.inside(batch, l.after * step);
        p.column.inside(l.after, step);
      } else {
        (d < l.dim ? p.row : d < dims - l.own ? p.column : p.channel).inside(n, step);
      }
    }
  }
  if (copied || (p.channel.even && p.row.even && p.column.even)) return p;
  return planes_of(torch::stable::contiguous(t), l, true);
}

template <typename Source>
class Accounting {
 public:
  using E = typename ComputeIn<Source>::type;

  Accounting(const ExampleOrder& order, int64_t num_groups, bool sums, E* sqnorm, E* sum_sqnorm)
      : order_(order),
        batch_(static_cast<int64_t>(order.examples.size())),
        num_groups_(num_groups),
        sums_(sums),
        sqnorm_(sqnorm),
        sum_sqnorm_(sum_sqnorm) {}

  std::vector<Tensor> totals, groups;

  void add(const AccountLayer& l, const Tensor& x, const Tensor& g, const Tensor* statistics) {
    if (l.kind == AccountLayer::kConvolution) {
      if (l.weight()) convolution(l, planar(x), planar(g));
      if (l.bias()) bias(l, planes_of(g, l));
    } else if (l.kind == AccountLayer::kLinear) {
      const Planes gs = planes_of(g, l);
      if (l.weight()) linear(planes_of(x, l), gs);
      if (l.bias()) bias(l, gs);
    } else {
      normalization(l, x, g, statistics);
    }
  }

 private:
  void linear(const Planes& x, const Planes& g) {
    const Axis row{x.row.size, 1, 1, 0, 1}, column{x.column.size, 1, 1, 0, 1};
    const int64_t inputs = x.channel.size, outputs = g.channel.size;
    weight({1, inputs, outputs, row, column},
           {x.operand<Source>(), g.operand<Source>(), 1, inputs, outputs, row, column}, {outputs, inputs});
  }

  void convolution(const AccountLayer& l, const Tensor& x, const Tensor& g) {
    const GradSqnormShape s = conv2d_shape("account", x, g, l.kernel, l.stride, l.padding, l.dilation, l.groups);
    weight(s, problem_of<Source>(x, g, s), {l.groups * s.outputs, s.inputs, l.kernel[0], l.kernel[1]});
  }

  void weight(const GradSqnormShape& s, const GradSqnormProblem<Source>& problem, const Sizes& sizes) {
    std::vector<double> norms(batch_);
    E* const total = result(sizes);
    if (batch_ > 0 && s.positions() > 0 && s.inputs > 0 && s.outputs > 0) {
      if (sums_) {
        E* const to = num_groups_ ? data(groups.back()) : total;
        add_grads<Source, E>(problem, s, order_, nullptr, 0, norms.data(), nullptr, to,
                             std::max<int64_t>(1, num_groups_));
        add_groups(total);
      } else {
        add_sqnorms(s.choose(), problem, s, batch_, norms.data());
      }
    }
    for (const double norm : norms) *sqnorm_++ = static_cast<E>(norm);
    finish(total);
  }

  void bias(const AccountLayer& l, const Planes& g) {
    if (g.dense(g.channel) && g.row.size * g.column.size == 1 && std::is_same_v<Source, E>) {
      return rows(static_cast<const E*>(g.tensor.const_data_ptr()), g.batch.step, g);
    }
    const E zero = 0, one = 1;
    NormalizationGrads n{};
    n.mean = &zero, n.rstd = &one;
    grads_of_normalization(n, l, g, g);
    rows(shift_.data(), g.channel.size, g);
  }

  void normalization(const AccountLayer& l, const Tensor& input, const Tensor& grad, const Tensor* statistics) {
    const Planes x = planes_of(input, l), g = planes_of(grad, l);
    const E *mean = data(statistics[0]), *rstd = data(statistics[1]);
    NormalizationGrads n{};
    std::vector<E> means, rstds;
    if (l.kind == AccountLayer::kLayerNorm) {
      n.mean_strides = planes_of(statistics[0], l).strides(), n.rstd_strides = n.mean_strides;
      row_of_statistics_ = planes_of(statistics[0], l).row.step;
    } else {
      const int64_t channels = x.channel.size, of_examples = l.own ? batch_ : 1;
      n.mean_strides = n.rstd_strides = {l.own ? channels : 0, channels == 1 ? 0 : 1, 0};
      means.resize(of_examples * channels), rstds.resize(of_examples * channels);
      for (int64_t i = 0; i < of_examples * channels; ++i) {
        const int64_t at = l.own ? i / channels * l.own + i % channels / (channels / l.own) : i;
        means[i] = mean[at];
        rstds[i] = l.eps < 0 ? rstd[at] : 1 / std::sqrt(rstd[at] + static_cast<E>(l.eps));
      }
      mean = means.data(), rstd = rstds.data();
    }
    n.mean = mean, n.rstd = rstd;
    grads_of_normalization(n, l, x, g);
    row_of_statistics_ = 0;
    if (l.weight()) rows(scale_.data(), g.channel.size, g);
    if (l.bias()) rows(shift_.data(), g.channel.size, g);
  }

  // Fills scale_ and shift_, [batch, channels].
  void grads_of_normalization(NormalizationGrads n, const AccountLayer& l, const Planes& x, const Planes& g) {
    const int64_t size = batch_ * g.channel.size;
    scale_.assign(size, 0), shift_.assign(size, 0);
    if (size == 0 || g.row.size * g.column.size == 0) return;
    const bool columns = x.dense(x.column) && g.dense(g.column), channels = x.dense(x.channel) && g.dense(g.channel);
    if (!columns && !channels) {
      const auto copy = [&](const Planes& p) { return planes_of(torch::stable::contiguous(p.tensor), l, true); };
      return grads_of_normalization(n, l, copy(x), copy(g));
    }
    n.channels_inside = channels && !(columns && g.column.size >= g.channel.size);
    n.input_strides = x.strides(), n.grad_strides = g.strides();
    n.batch = batch_, n.channels = g.channel.size, n.positions = g.column.size;
    std::vector<E> scale(g.row.size > 1 ? size : 0), shift(scale.size());
    n.scale = scale_.data(), n.shift = shift_.data();
    if (g.row.size > 1) n.scale = scale.data(), n.shift = shift.data();
    const E *const mean = static_cast<const E*>(n.mean), *const rstd = static_cast<const E*>(n.rstd);
    for (int64_t r = 0; r < g.row.size; ++r) {
      n.input = static_cast<const Source*>(x.tensor.const_data_ptr()) + r * x.row.step;
      n.grad_output = static_cast<const Source*>(g.tensor.const_data_ptr()) + r * g.row.step;
      n.mean = mean + r * row_of_statistics_, n.rstd = rstd + r * row_of_statistics_;
      add_normalization_grads(n, g.tensor.scalar_type());
      for (size_t i = 0; i < scale.size(); ++i) scale_[i] += scale[i], shift_[i] += shift[i];
    }
  }

  // Takes note of gradients [batch, channels] that are there.
  void rows(const E* from, int64_t step, const Planes& g) {
    const int64_t n = g.channel.size;
    torch::stable::parallel_for(0, batch_, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t b = begin; b < end; ++b) {
                                    sqnorm_[b] = static_cast<E>(square(from + b * step, n, 1));
                                  }
                                });
    sqnorm_ += batch_;
    E* const total = result({n});
    if (sums_) {
      E* const to = num_groups_ ? data(groups.back()) : total;
      for (int64_t i = 0; i < batch_; ++i) {
        const E* const row = from + order_.examples[i] * step;
        E* const sum = to + order_.ids[i] * n;
        for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
      }
      add_groups(total);
    }
    finish(total);
  }

  // Makes the sums of a parameter, of zeros, and returns where that over all examples is.
  E* result(const Sizes& sizes) {
    if (!sums_) return nullptr;
    totals.push_back(zeros<E>(sizes));
    if (num_groups_) {
      Sizes each{num_groups_};
      each.insert(each.end(), sizes.begin(), sizes.end());
      groups.push_back(zeros<E>(each));
    }
    return data(totals.back());
  }

  void add_groups(E* total) {
    if (num_groups_ == 0) return;
    const E* const from = data(groups.back());
    const int64_t n = totals.back().numel();
    for (int64_t i = 0; i < num_groups_; ++i) {
      for (int64_t j = 0; j < n; ++j) total[j] += from[i * n + j];
    }
  }

  void finish(const E* total) {
    if (sums_) *sum_sqnorm_++ = static_cast<E>(square(total, totals.back().numel(), 1));
  }

  static E* data(const Tensor& t) { return static_cast<E*>(t.mutable_data_ptr()); }

  const ExampleOrder& order_;
  const int64_t batch_, num_groups_;
  const bool sums_;
  E *sqnorm_, *sum_sqnorm_;
  std::vector<E> scale_, shift_;
  int64_t row_of_statistics_ = 0;
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> account(std::vector<Tensor> inputs, std::vector<Tensor> grad_outputs,
                                                        std::vector<Tensor> statistics, std::vector<int64_t> geometry,
                                                        std::vector<double> eps, const std::optional<Tensor>& group_ids,
                                                        int64_t num_groups, bool sums) {
  const char* const op = "account";
  const size_t count = inputs.size();
  MEMLOC_CHECK(count > 0 && grad_outputs.size() == count && eps.size() == count &&
                   geometry.size() == count * AccountLayer::kNumbers,
               op, ": each of one or more layers must have an input, a grad_output, ", AccountLayer::kNumbers,
               " numbers and an eps, got ", count, ", ", grad_outputs.size(), ", ", geometry.size(), " and ",
               eps.size());
  std::vector<AccountLayer> layers;
  const Tensor& first = grad_outputs[0];
  int64_t batch = 0, parameters = 0;
  size_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &x = inputs[i], &g = grad_outputs[i];
    const AccountLayer l(geometry.data() + i * AccountLayer::kNumbers, eps[i]);
    const int64_t own = check_account_layer(l, x, g);
    MEMLOC_CHECK(g.is_cpu() && x.is_cpu(), op, ": grad_outputs and inputs must be on the device of the first");
    MEMLOC_CHECK(i == 0 || own == batch, op, ": each layer must have ", batch, " examples, got ", own);
    MEMLOC_CHECK((g.scalar_type() == ScalarType::Double) == (first.scalar_type() == ScalarType::Double), op,
                 ": layers must have dtype float64 all or none");
    batch = own, parameters += l.weight() + l.bias();
    MEMLOC_CHECK(!l.normalization() || used + 2 <= statistics.size(), op, ": a normalisation needs two statistics");
    for (int j = 0; l.normalization() && j < 2; ++j) check_account_statistic(l, statistics[used++], g);
    layers.push_back(l);
  }
  MEMLOC_CHECK(used == statistics.size(), op, ": there must be two statistics for each normalisation, got ",
               statistics.size());
  Tensor sqnorm, squares;
  with_element(first, [&](auto element) {
    using E = typename ComputeIn<decltype(element)>::type;
    sqnorm = zeros<E>({parameters, batch}), squares = zeros<E>({sums ? parameters : 0});
  });
  MEMLOC_CHECK(sums || !group_ids, op, ": group_ids need sums");
  if (group_ids) check_groups(op, torch::stable::transpose(sqnorm, 0, 1), *group_ids, num_groups);
  const ExampleOrder order(op, batch, group_ids, num_groups);
  std::vector<Tensor> results, groups;
  size_t parameter = 0, statistic = 0;
  for (size_t i = 0; i < count; ++i) {
    with_element(grad_outputs[i], [&](auto element) {
      using Layer = Accounting<decltype(element)>;
      using E = typename Layer::E;
      Layer layer(order, group_ids ? num_groups : 0, sums,
                  static_cast<E*>(sqnorm.mutable_data_ptr()) + parameter * batch,
                  static_cast<E*>(squares.mutable_data_ptr()) + parameter);
      layer.add(layers[i], inputs[i], grad_outputs[i], statistics.data() + statistic);
      results.insert(results.end(), layer.totals.begin(), layer.totals.end());
      groups.insert(groups.end(), layer.groups.begin(), layer.groups.end());
    });
    parameter += layers[i].weight() + layers[i].bias(), statistic += 2 * layers[i].normalization();
  }
  results.insert(results.end(), groups.begin(), groups.end());
  return {sqnorm, squares, results};
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) { m.impl("account", TORCH_BOX(&memloc::account)); }
