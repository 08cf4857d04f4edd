// Bound by arithmetic, one exp per (feature, example, class). Threads share pairs of a block of features and an
// example; a block's logits, [classes, block], are kept as floats between the pass that finds their maximum and the one
// that adds up. The features of a block are the lanes of all vectors, so that weights are read in their own order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "cpu/vector_math.h"
#include "linear_ablation_loss_args.h"
#include "summation.h"

namespace memloc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;         // features
constexpr int64_t kGrainExps = 16384;  // least work worth a thread

// The classes' logits with every feature on, and by how much a unit of each of some features moves them.
struct Logits {
  const double* whole;  // [classes] at whole_step
  int64_t whole_step;
  const double* bias;    // [classes], or null
  const double* weight;  // [classes] rows at weight_step
  int64_t weight_step, classes;
};

// loss[c] and best[c], the first largest class, when feature c moves by -delta[c], for `count` <= kBlock features;
// logits has room for [classes, kBlock].
template <typename E>
MEMLOC_CLONES void losses(const Logits& l, const double* __restrict__ delta, int64_t count, int64_t target,
                          E* __restrict__ logits, E* __restrict__ loss,
                          typename FloatFormat<E>::Bits* __restrict__ best) {
  using Index = typename FloatFormat<E>::Bits;
  E most[kBlock];
  double total[kBlock] = {};
  std::fill(most, most + kBlock, -std::numeric_limits<E>::infinity());
  std::fill(best, best + kBlock, Index{0});
  for (int64_t k = 0; k < l.classes; ++k) {
    const double whole = l.whole[k * l.whole_step] + (l.bias != nullptr ? l.bias[k] : 0);
    const double* const weight = l.weight + k * l.weight_step;
    E* const row = logits + k * kBlock;
    const Index index = static_cast<Index>(k);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) row[c] = static_cast<E>(whole - weight[c] * delta[c]);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const bool more = !(row[c] <= most[c]) & (most[c] == most[c]);  // the first NaN is the maximum
      most[c] = more ? row[c] : most[c];
      best[c] = more ? index : best[c];
    }
  }
  for (int64_t first = 0; first < l.classes; first += kChain) {
    E sum[kBlock] = {};
    for (int64_t k = first; k < std::min(first + kChain, l.classes); ++k) {
      const E* const row = logits + k * kBlock;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) sum[c] += exp_nonpositive(row[c] - most[c]);
    }
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) total[c] += sum[c];
  }
  const E* const at_target = logits + target * kBlock;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) loss[c] = log_from_one(static_cast<E>(total[c])) - (at_target[c] - most[c]);
}

template <typename E>
void run(const LinearAblationLossProblem& p, E* loss, int64_t* predicted) {
  using Index = typename FloatFormat<E>::Bits;
  const int64_t blocks = (p.count + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrainExps / (kBlock * p.classes));
  // examples innermost, so that they share a block's weights in cache and their results lie beside each other
  torch::stable::parallel_for(0, blocks * p.batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<E> logits(p.classes * kBlock);
    double delta[kBlock];
    E own_loss[kBlock];
    Index best[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / p.batch * kBlock, b = i % p.batch, count = std::min(kBlock, p.count - first);
      for (int64_t c = 0; c < count; ++c) delta[c] = p.delta(b, first + c);
      const Logits whole{p.logits + b, p.batch, p.bias, p.weight + first, p.count, p.classes};
      losses(whole, delta, count, p.targets[b], logits.data(), own_loss, best);
      for (int64_t c = 0; c < count; ++c) {
        loss[(first + c) * p.batch + b] = own_loss[c];
        predicted[(first + c) * p.batch + b] = best[c];
      }
      for (int64_t c = 0; c < count; ++c) {
        if (std::isfinite(delta[c])) continue;
        std::vector<double> replaced(p.classes);
        for (int64_t k = 0; k < p.classes; ++k) replaced[k] = p.replaced_logit(b, first + c, k);
        const double nothing = 0;
        const Logits alone{replaced.data(), 1, nullptr, &nothing, 0, p.classes};
        losses(alone, &nothing, 1, p.targets[b], logits.data(), own_loss, best);
        loss[(first + c) * p.batch + b] = own_loss[0];
        predicted[(first + c) * p.batch + b] = best[0];
      }
    }
  });
}

void check_targets(const LinearAblationLossProblem& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    MEMLOC_CHECK(p.targets[b] >= 0 && p.targets[b] < p.classes, "linear_ablation_loss: targets must be in [0, ",
                 p.classes, "), got ", p.targets[b]);
  }
}

std::tuple<Tensor, Tensor> linear_ablation_loss(const Tensor& features, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& targets,
                                                const Tensor& baseline) {
  const LinearAblationLossArgs args{features, weight, bias, targets, baseline};
  args.check();
  const LinearAblationLossInputs inputs(args);
  check_targets(inputs.problem());
  Tensor loss = args.result(args.loss_type()), predicted = args.result(ScalarType::Long);
  if (loss.numel() == 0) return {loss, predicted};
  int64_t* const classes = static_cast<int64_t*>(predicted.mutable_data_ptr());
  if (args.loss_type() == ScalarType::Double) {
    run(inputs.problem(), static_cast<double*>(loss.mutable_data_ptr()), classes);
  } else {
    run(inputs.problem(), static_cast<float*>(loss.mutable_data_ptr()), classes);
  }
  return {loss, predicted};
}

}  // namespace
}  // namespace memloc

STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m) {
  m.impl("linear_ablation_loss", TORCH_BOX(&memloc::linear_ablation_loss));
}
